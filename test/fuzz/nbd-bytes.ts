// Bytes of NBD conversations for the fuzz: a writer that makes messages in one buffer, and the damage that is done to what it
// made. Written from the specification and on purpose not with the code under test.

import type { Random } from '../../src/base/random.ts'

/** Longest conversation, in bytes. */
const CAPACITY = 1024 * 1024

/** Numbers that parsers get wrong. */
const NUMBERS = [
  0, 1, 2, 3, 4, 7, 8, 0xff, 0x100, 0x7fff, 0x8000, 0x8001, 0xffff, 0x1_0000, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff,
]

/** Makes a conversation; `reset` begins the next in the same buffer. */
export class WireWriter {
  readonly #bytes = Buffer.alloc(CAPACITY)
  #end = 0

  reset(): void {
    this.#end = 0
  }

  get length(): number {
    return this.#end
  }

  u16(value: number): this {
    this.#end = this.#bytes.writeUInt16BE(value & 0xffff, this.#end)
    return this
  }

  u32(value: number): this {
    this.#end = this.#bytes.writeUInt32BE(value >>> 0, this.#end)
    return this
  }

  u64(value: number): this {
    return this.u32(Math.floor(value / 2 ** 32)).u32(value % 2 ** 32)
  }

  text(value: string): this {
    this.#end += this.#bytes.write(value, this.#end, 'latin1')
    return this
  }

  /** A text with its length before it. */
  string(value: string): this {
    return this.u32(value.length).text(value)
  }

  fill(length: number, byte: number): this {
    this.#bytes.fill(byte, this.#end, this.#end + length)
    this.#end += length
    return this
  }

  /** What comes next is data whose length is written at `at` when it is complete. */
  patchLength(at: number, from: number): void {
    this.#bytes.writeUInt32BE(this.#end - from, at)
  }

  /** The conversation, valid until the next `reset`. */
  get bytes(): Uint8Array {
    return new Uint8Array(this.#bytes.buffer, this.#bytes.byteOffset, this.#end)
  }

  /** Does some damage; returns how many times. */
  damage(random: Random): number {
    const times = random.pick([1, 1, 1, 2, 3, 6])
    for (let i = 0; i < times && this.#end > 0; i++) this.#damageOnce(random)
    return times
  }

  #damageOnce(random: Random): void {
    const bytes = this.#bytes
    const at = random.below(this.#end)
    const length = Math.min(random.pick([1, 2, 4, 8, 16, 28, 100]), this.#end - at)
    switch (random.below(8)) {
      case 0:
        bytes[at] = (bytes[at] as number) ^ (1 << random.below(8))
        break
      case 1:
        bytes[at] = random.next()
        break
      case 2:
      case 3:
        if (at + 4 <= this.#end) bytes.writeUInt32BE(random.pick(NUMBERS), at & ~1)
        break
      case 4:
        // Something is missing.
        bytes.copyWithin(at, at + length, this.#end)
        this.#end -= length
        break
      case 5:
        // Something is there twice.
        if (this.#end + length > CAPACITY) break
        bytes.copyWithin(at + length, at, this.#end)
        this.#end += length
        break
      case 6:
        this.#end = at
        break
      default:
        for (let i = 0; i < length; i++) bytes[at + i] = random.next()
    }
  }
}

/** Cuts bytes into pieces as a network might, most often none; calls `deliver` with each until it says no. */
export function inPieces(bytes: Uint8Array, random: Random, deliver: (piece: Uint8Array) => boolean): void {
  const most = random.pick([
    bytes.length,
    bytes.length,
    bytes.length,
    bytes.length >> 1,
    1500,
    bytes.length < 2000 ? 30 : 3000,
  ])
  for (let at = 0; at < bytes.length; ) {
    const length = most >= bytes.length ? bytes.length : random.between(1, Math.max(1, most))
    if (!deliver(bytes.subarray(at, at + length))) return
    at += length
  }
}
