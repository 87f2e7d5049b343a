// One sync for many: whoever asks while one is under way waits for the next, which they then share. A file's sync covers
// every write that completed before it was called, so the one under way would not do. A failed sync may have lost writes
// for good, so all that follow fail too.

import { BlockError, isBlockError } from '../../block/error.ts'
import type { HostFile } from '../../host/host.ts'

export class SharedSync {
  readonly #files: readonly HostFile[]
  #running: Promise<void> | undefined
  #next: Promise<void> | undefined
  #failure: BlockError | undefined

  /** Syncs the files one after the other. */
  constructor(files: readonly HostFile[]) {
    this.#files = files
  }

  /** What every sync fails with after the first that failed. */
  get failure(): BlockError | undefined {
    return this.#failure
  }

  /** Makes every sync from now on fail: what the file holds is no longer known. */
  fail(cause: unknown): void {
    const path = this.#files.at(-1)?.path ?? ''
    const message = `${path}: a write or sync failed, so that writes may be lost; close the image and open it again`
    this.#failure ??= new BlockError('io', message, { path }, cause)
  }

  /** Resolves when everything that was written before the call is on stable storage. Kind 'io' when that is uncertain. */
  async run(): Promise<void> {
    if (this.#failure !== undefined) throw this.#failure
    this.#next ??= this.#after(this.#running)
    try {
      await this.#next
    } catch (error) {
      if (isBlockError(error, 'closed')) throw error
      this.fail(error)
      throw this.#failure
    }
  }

  async #after(running: Promise<void> | undefined): Promise<void> {
    // How the earlier sync ended is the affair of those who waited for it.
    if (running !== undefined) await Promise.allSettled([running])
    // Those who ask in the same turn of the event loop come along.
    await Promise.resolve()
    const sync = this.#syncAll()
    this.#running = sync
    this.#next = undefined
    try {
      await sync
    } finally {
      if (this.#running === sync) this.#running = undefined
    }
  }

  async #syncAll(): Promise<void> {
    for (const file of this.#files) await file.sync()
  }
}
