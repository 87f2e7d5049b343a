// A guest that stamps and zeroes blocks of a disk and remembers, for each block, all that it was told to hold, in order: so that of
// what is read after a crash it can be said whether it may be so.
//
//   block 7    3 -> 9 -> zeros -> 12 -> 15
//                        ^ flushed ^ acknowledged
//                                       ^ issued          after a power loss: zeros, 12 or 15; after a kill: 12 or 15

import assert from 'node:assert/strict'
import { getUint32, setUint32 } from '../../src/base/bytes.ts'
import { type BlockDevice, MAY_UNMAP } from '../../src/block/device.ts'

export const BLOCK = 4096
const SECTOR = 512

/** What may be torn: by a power loss sectors, by a kill nothing. */
export const PIECES = { kill: BLOCK, power: SECTOR } as const

/** What each block may hold: its history from one place in it to another. Histories only grow. */
export interface Bounds {
  readonly history: readonly (readonly number[])[]
  readonly oldest: Uint32Array
  readonly newest: Uint32Array
}

/** Zeros as an entry of a history; stamps are larger. */
const ZEROS = 0

export class VersionedGuest {
  readonly blocks: number
  #history: number[][]
  #acknowledged: Uint32Array
  #flushed: Uint32Array
  #next = 1

  /** Of a disk that reads as zeros. */
  constructor(blocks: number) {
    this.blocks = blocks
    this.#history = Array.from({ length: blocks }, () => [ZEROS])
    this.#acknowledged = new Uint32Array(blocks)
    this.#flushed = new Uint32Array(blocks)
  }

  async write(device: BlockDevice, block: number, count = 1): Promise<void> {
    const bytes = Buffer.alloc(count * BLOCK)
    const done = Array.from({ length: count }, (_, index) => {
      const stamp = this.#next++
      bytes.set(stamped(stamp), index * BLOCK)
      return this.#issue(block + index, stamp)
    })
    await device.write(block * BLOCK, bytes.length, bytes, 0, 0)
    for (const acknowledge of done) acknowledge()
  }

  async zero(device: BlockDevice, block: number, count: number, mayUnmap: boolean): Promise<void> {
    const done = Array.from({ length: count }, (_, index) => this.#issue(block + index, ZEROS))
    await device.zero(block * BLOCK, count * BLOCK, mayUnmap ? MAY_UNMAP : 0)
    for (const acknowledge of done) acknowledge()
  }

  async flush(device: BlockDevice): Promise<void> {
    const before = this.#acknowledged.slice()
    const history = this.#history
    await device.flush()
    if (history === this.#history) this.#flushed.set(before)
  }

  /** What the blocks may hold after a kill, from the acknowledged on, or after a power loss, from the flushed on. */
  bounds(kind: 'kill' | 'power'): Bounds {
    const oldest = (kind === 'kill' ? this.#acknowledged : this.#flushed).slice()
    return { history: this.#history, oldest, newest: lastOf(this.#history) }
  }

  /** Of a moment between `before` and now; when the disk was set back meanwhile, either before that or after it. */
  since(before: Bounds): Bounds[] {
    const until = { ...before, newest: lastOf(before.history) }
    if (before.history === this.#history) return [until]
    return [until, { history: this.#history, oldest: new Uint32Array(this.blocks), newest: lastOf(this.#history) }]
  }

  /** The disk holds this now, and did when it was last flushed. No request may be in flight. */
  reset(content: Buffer): void {
    this.#history = Array.from({ length: this.blocks }, (_, block) => [stampAt(content, block * BLOCK)])
    this.#acknowledged = new Uint32Array(this.blocks)
    this.#flushed = new Uint32Array(this.blocks)
  }

  #issue(block: number, stamp: number): () => void {
    const history = this.#history[block] as number[]
    const place = history.push(stamp) - 1
    return () => {
      this.#acknowledged[block] = Math.max(this.#acknowledged[block] as number, place)
    }
  }
}

function lastOf(history: Bounds['history']): Uint32Array {
  return Uint32Array.from(history, ({ length }) => length - 1)
}

/** The bounds of what is known exactly. */
export function exactly(content: Buffer, blocks: number): Bounds {
  const history = Array.from({ length: blocks }, (_, block) => [stampAt(content, block * BLOCK)])
  return { history, oldest: new Uint32Array(blocks), newest: new Uint32Array(blocks) }
}

function stamped(stamp: number): Buffer {
  const block = Buffer.alloc(BLOCK)
  for (let at = 0; at < BLOCK; at += 4) setUint32(block, at, stamp)
  return block
}

function stampAt(bytes: Buffer, at: number): number {
  return getUint32(bytes, at)
}

/** The blocks that hold what a request wrote that was not acknowledged; zeros, which may be older, are not told. */
export function tookEffect(bytes: Buffer, { history, oldest }: Bounds): Set<number> {
  const took = new Set<number>()
  for (const [block, all] of history.entries()) {
    if (all.length - 1 === oldest[block]) continue
    for (let at = block * BLOCK; at < (block + 1) * BLOCK; at += SECTOR) {
      const stamp = stampAt(bytes, at)
      if (stamp !== ZEROS && all.indexOf(stamp) > (oldest[block] as number)) took.add(block)
    }
  }
  return took
}

/** What is wrong with the content, if anything: each piece must be whole and hold what its block may hold, the rest zeros. */
export function findWrong(bytes: Buffer, { history, oldest, newest }: Bounds, piece: number): string | undefined {
  const end = history.length * BLOCK
  for (let at = 0; at < end; at += piece) {
    const stamp = stampAt(bytes, at)
    // A piece is whole when it equals itself, four bytes on.
    const isWhole = bytes.compare(bytes, at, at + piece - 4, at + 4, at + piece) === 0
    const block = Math.floor(at / BLOCK)
    if (!isWhole) return `block ${block} is torn`
    const from = oldest[block] as number
    const to = (newest[block] as number) + 1
    const place = (history[block] as readonly number[]).indexOf(stamp, from)
    if (place < 0 || place >= to) {
      const may = (history[block] as readonly number[]).slice(from, to)
      return `block ${block} holds ${stamp}, and may hold ${may.join(', ')}`
    }
  }
  const rest = bytes.subarray(end)
  return rest.every((byte) => byte === 0) ? undefined : 'what was added is not zeros'
}

/** Fails unless one of several bounds fits. */
export function checkContent(bytes: Buffer, any: readonly Bounds[], piece: number, note: string): void {
  const wrong = any.map((bounds) => findWrong(bytes, bounds, piece))
  assert.ok(wrong.includes(undefined), `${note}: ${wrong.join('; or ')}`)
}
