// A moment of a disk that somebody else keeps, read over NBD: another daemon's, or a QEMU's. What the backup has is given back by TRIM, a few at a
// time and without waiting for it, so that little old data is kept there.

import { GRANULE, VIEW_TRIMS } from '../base/limits.ts'
import { Bitmap } from '../bitmap/bitmap.ts'
import type { ExtentVisitor, Pending } from '../block/device.ts'
import type { NbdClient } from '../nbd/client.ts'
import type { BackupView } from './backup.ts'

export class NbdView implements BackupView {
  /** Which the other side knows and this side does not. */
  readonly savedBytes = 0
  readonly scratchPeak = 0
  readonly changed: Bitmap | undefined
  readonly #client: NbdClient
  readonly #explain: ((error: unknown) => unknown) | undefined
  /** Ranges to give back, as offset and length, and those that are on their way. */
  readonly #queue: number[] = []
  readonly #onTheirWay = new Set<Promise<void>>()

  /** The view closes the client. `explain` says of its errors what they mean. */
  constructor(client: NbdClient, changed: Bitmap | undefined, explain?: (error: unknown) => unknown) {
    this.#client = client
    this.changed = changed
    this.#explain = explain
  }

  get size(): number {
    return this.#client.size
  }

  /** The view's block device, for whoever copies it in another way. */
  get device(): NbdClient {
    return this.#client
  }

  read(offset: number, length: number, into: Uint8Array, at: number): Pending {
    return this.#explained(this.#client.read(offset, length, into, at))
  }

  extents(offset: number, length: number, visit: ExtentVisitor): Pending {
    return this.#explained(this.#client.extents(offset, length, visit))
  }

  restrict(needed: Bitmap): void {
    const unneeded = this.changed?.copy() ?? new Bitmap(this.size)
    if (this.changed === undefined) unneeded.setAll()
    unneeded.andNot(needed)
    unneeded.runs(0, this.size, this.size, (offset, length) => this.release(offset, length) === undefined)
  }

  release(offset: number, length: number): void {
    this.#queue.push(offset, length)
    this.#sendTrims()
  }

  flushDisk(): Pending {
    return this.#client.flush()
  }

  /** Shows the other side that its reader lives. */
  touch(): void {
    this.#client.extents(0, Math.min(GRANULE, this.size), () => false)?.catch(() => undefined)
  }

  /** Resolves when the other side knows of all that was released. */
  async settled(): Promise<void> {
    while (this.#onTheirWay.size > 0) await Promise.race(this.#onTheirWay)
  }

  async close(): Promise<void> {
    this.#queue.length = 0
    await this.#client.close()
  }

  #explained(pending: Pending): Pending {
    const explain = this.#explain
    if (explain === undefined) return pending
    return pending?.catch((error: unknown) => {
      throw explain(error)
    })
  }

  #sendTrims(): void {
    while (this.#queue.length > 0 && this.#onTheirWay.size < VIEW_TRIMS) {
      const [offset = 0, length = 0] = this.#queue.splice(0, 2)
      // Should it not arrive, scratch holds more than it must, and the reads that follow say what is wrong.
      const sent: Promise<void> = (this.#client.trim(offset, length, 0) ?? Promise.resolve())
        .catch(() => undefined)
        .finally(() => {
          this.#onTheirWay.delete(sent)
          this.#sendTrims()
        })
      this.#onTheirWay.add(sent)
    }
  }
}

/** What a bitmap of the export says, one of `qemu:dirty-bitmap:` that was asked for. */
export async function dirtyBits(client: NbdClient, context: string): Promise<Bitmap> {
  const bits = new Bitmap(client.size, GRANULE)
  let position = 0
  await client.status(context, 0, client.size, (length, status) => {
    if ((status & 1) !== 0) bits.set(position, length)
    position += length
    return true
  })
  return bits
}
