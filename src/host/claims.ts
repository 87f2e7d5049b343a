// Claims on an image file, seen by other processes: QEMU's image locks (its block/file-posix.c), so that QEMU respects ours and we
// respect QEMU's. A shared lock on byte 100 + p says "I use permission p", one on 200 + p says "I do not share permission p".
// Permissions: 0 consistent read, 1 write, 3 resize.

import { BlockError } from '../block/error.ts'
import { describeHolders, findHolders } from './holders.ts'
import { syscalls } from './syscalls.ts'

const LOCK_USES = { read: [100], write: [100, 101, 103] } as const
const LOCK_REFUSES = { read: [201, 203], write: [201, 203] } as const
const LOCK_FIRST = 100
const LOCK_SPAN = 108

export type ClaimKind = 'read' | 'write'

/** The claim of one open file. Without system calls it is always granted. */
export class Claim {
  readonly #path: string
  readonly #fd: number
  #kind: ClaimKind | undefined

  constructor(path: string, fd: number) {
    this.#path = path
    this.#fd = fd
  }

  /** Changes it; undefined gives it back. Kind 'busy' on a conflict; the old claim then stays. */
  change(kind: ClaimKind | undefined): void {
    if (syscalls === undefined || kind === this.#kind) return
    const old = this.#kind
    this.#take(kind)
    if (kind !== undefined && this.#isContested(kind)) {
      this.#take(old)
      const who = describeHolders(findHolders(this.#path))
      const message = `${this.#path} is in use by ${who}${kind === 'read' ? ', which writes to it' : ''}: end that first`
      throw new BlockError('busy', message, { path: this.#path })
    }
    this.#kind = kind
  }

  /** Takes our locks first and looks at others' after, as QEMU does: of two that race, at least one sees the other. */
  #take(kind: ClaimKind | undefined): void {
    syscalls?.lockShared(this.#fd, LOCK_FIRST, LOCK_SPAN, false)
    if (kind === undefined) return
    for (const byte of [...LOCK_USES[kind], ...LOCK_REFUSES[kind]]) {
      const errno = syscalls?.lockShared(this.#fd, byte, 1, true) ?? 0
      if (errno !== 0) throw new BlockError('busy', `${this.#path}: cannot lock (errno ${errno})`, { path: this.#path })
    }
  }

  #isContested(kind: ClaimKind): boolean {
    const usedByOthers = LOCK_REFUSES[kind].some((byte) => syscalls?.isLocked(this.#fd, byte - 100))
    return usedByOthers || LOCK_USES[kind].some((byte) => syscalls?.isLocked(this.#fd, byte + 100))
  }
}
