// The clock by which a log folds, in place of which tests have one that they turn by hand.

/** Calls `run` once after the delay unless the function returned is called before; must not keep the process alive. */
export type Timer = (delayMs: number, run: () => void) => () => void

export const systemTimer: Timer = (delayMs, run) => {
  const timer = setTimeout(run, delayMs).unref()
  return () => clearTimeout(timer)
}
