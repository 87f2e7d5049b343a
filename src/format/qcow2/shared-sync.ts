// One sync for many: whoever asks while one is under way waits for the next, which they then share. A file's sync covers
// every write that completed before it was called, so the one under way would not do.

import type { HostFile } from '../../host/host.ts'

export class SharedSync {
  readonly #file: HostFile
  #running: Promise<void> | undefined
  #next: Promise<void> | undefined

  constructor(file: HostFile) {
    this.#file = file
  }

  /** Resolves when everything that was written before the call is on stable storage. */
  run(): Promise<void> {
    this.#next ??= this.#after(this.#running)
    return this.#next
  }

  async #after(running: Promise<void> | undefined): Promise<void> {
    // How the earlier sync ended is the affair of those who waited for it.
    if (running !== undefined) await Promise.allSettled([running])
    // Those who ask in the same turn of the event loop come along.
    await Promise.resolve()
    const sync = this.#file.sync()
    this.#running = sync
    this.#next = undefined
    try {
      await sync
    } finally {
      if (this.#running === sync) this.#running = undefined
    }
  }
}
