// An image's file, lent to who only reads it: a snapshot's device. Its close gives nothing back but the loan; the lender's
// close ends it too. It writes nothing and takes no claim: the lender holds one.

import type { ExtentVisitor, Pending } from '../../block/device.ts'
import { BlockError } from '../../block/error.ts'
import type { HostFile } from '../../host/host.ts'

export class BorrowedFile implements HostFile {
  readonly writable = false
  readonly #lender: HostFile
  #giveBack: (() => void) | undefined

  /** `giveBack` is called once, at the close. */
  constructor(lender: HostFile, giveBack: () => void) {
    this.#lender = lender
    this.#giveBack = giveBack
  }

  get path(): string {
    return this.#lender.path
  }

  size(): number {
    return this.#mustLend().size()
  }

  read(offset: number, length: number, into: Uint8Array, at: number): Pending {
    return this.#mustLend().read(offset, length, into, at)
  }

  readNow(offset: number, length: number, into: Uint8Array, at: number): void {
    this.#mustLend().readNow(offset, length, into, at)
  }

  extents(offset: number, length: number, visit: ExtentVisitor): Pending {
    return this.#mustLend().extents(offset, length, visit)
  }

  write(): Pending {
    throw this.#refusal()
  }

  punch(): Pending {
    throw this.#refusal()
  }

  zero(): Pending {
    throw this.#refusal()
  }

  truncate(): Pending {
    throw this.#refusal()
  }

  async sync(): Promise<void> {}

  lock(): void {}

  async close(): Promise<void> {
    this.#giveBack?.()
    this.#giveBack = undefined
  }

  #mustLend(): HostFile {
    if (this.#giveBack !== undefined) return this.#lender
    throw new BlockError('closed', `${this.path}: the snapshot is closed`, { path: this.path })
  }

  #refusal(): BlockError {
    return new BlockError('read-only', `${this.path}: a snapshot is not written`, { path: this.path })
  }
}
