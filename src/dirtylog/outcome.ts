// Two ways not to look at the outcome of work, by name, so that each place says why it may.

/** Waits for the end of work whose outcome somebody else looks at. */
export async function settled(work: Promise<void>): Promise<void> {
  try {
    await work
  } catch {
    return
  }
}

/** For work whose failure shows elsewhere: in the log's health, and to those who wait for it. */
export function ignore(work: Promise<void>): void {
  work.catch(() => undefined)
}
