// Seeded random numbers, for tests, simulations and the demo: the same seed gives the same sequence on every machine.
// Not for secrets.

export class Random {
  readonly seed: number
  #state: number

  constructor(seed: number) {
    this.seed = seed >>> 0
    this.#state = this.seed
  }

  /** The next 32 random bits (the splitmix32 sequence). */
  next(): number {
    this.#state = (this.#state + 0x9e37_79b9) >>> 0
    let z = this.#state
    z = Math.imul(z ^ (z >>> 16), 0x21f0_aaad)
    z = Math.imul(z ^ (z >>> 15), 0x735a_2d97)
    return (z ^ (z >>> 15)) >>> 0
  }

  /** An integer from 0 to `limit` - 1. */
  below(limit: number): number {
    return limit <= 0x1_0000_0000
      ? Math.floor((this.next() / 0x1_0000_0000) * limit)
      : Math.floor(((this.next() * 0x20_0000 + (this.next() >>> 11)) / 2 ** 53) * limit)
  }

  /** An integer from `low` to `high`, both included. */
  between(low: number, high: number): number {
    return low + this.below(high - low + 1)
  }

  chance(probability: number): boolean {
    return this.next() / 0x1_0000_0000 < probability
  }

  pick<T>(items: readonly T[]): T {
    return items[this.below(items.length)] as T
  }

  fill(bytes: Uint8Array): Uint8Array {
    for (let i = 0; i < bytes.length; i++) bytes[i] = this.next()
    return bytes
  }
}

/** The seed for a run: the environment's VARVE_SEED, so that a failure replays, else a new one. */
export function seedOfRun(): number {
  const given = process.env['VARVE_SEED']
  return given === undefined ? Math.floor(Math.random() * 0x1_0000_0000) : Number(given) >>> 0
}
