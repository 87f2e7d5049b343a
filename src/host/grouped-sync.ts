// One sync of a file for all who ask for one meanwhile: those who ask while one is under way share the next, since the one under
// way covers only what was written before it began. When it fails, so does the next one that waits for it: the kernel
// tells of a lost write once, and whose it was is not known.

export class GroupedSync {
  readonly #sync: () => Promise<void>
  #running: Promise<void> | undefined
  #next: Promise<void> | undefined

  constructor(sync: () => Promise<void>) {
    this.#sync = sync
  }

  run(): Promise<void> {
    if (this.#running === undefined) return this.#start()
    this.#next ??= this.#afterRunning(this.#running)
    return this.#next
  }

  /** Resolves when none is under way and nobody waits for one. */
  async idle(): Promise<void> {
    for (let last = this.#next ?? this.#running; last !== undefined; last = this.#next ?? this.#running) {
      await Promise.allSettled([last])
    }
  }

  async #afterRunning(running: Promise<void>): Promise<void> {
    try {
      await running
    } finally {
      this.#next = undefined
    }
    // Between the end of that one and this turn somebody else may have begun another, which may be too early for us.
    await (this.#running === undefined ? this.#start() : this.run())
  }

  async #start(): Promise<void> {
    const running = this.#sync()
    this.#running = running
    try {
      await running
    } finally {
      if (this.#running === running) this.#running = undefined
    }
  }
}
