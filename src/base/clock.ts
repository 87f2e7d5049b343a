// Time behind an interface, so that tests and simulations can move it by hand.

export interface Clock {
  /** Milliseconds that only grow; the zero is arbitrary. */
  now(): number
  /** Milliseconds since 1970, UTC. */
  wall(): number
  sleep(delayMs: number): Promise<void>
}

export const systemClock: Clock = {
  now: () => performance.now(),
  wall: () => Date.now(),
  sleep: (delayMs) => new Promise((resolve) => setTimeout(resolve, delayMs)),
}
