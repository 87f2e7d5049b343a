// A guest that writes one block after the other, each with a number that grows, and remembers the order. So whatever is read of its disk
// later, as it was at some moment, can be checked whole: it must be what was there after the first k writes, for one k.
//
//   a block   | disk | block | number | noise that follows from the three |        all zeros: never written

import assert from 'node:assert/strict'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Random } from '../../src/base/random.ts'
import type { BlockDevice } from '../../src/block/device.ts'
import type { NbdClient } from '../../src/nbd/client.ts'

const BLOCK = 4096
const HEADER = 12
const PIECE = 1024 * 1024
const ZEROS = Buffer.alloc(BLOCK)

/** What one request took, and when it was answered; milliseconds of this process's clock. */
export interface Answer {
  readonly atMs: number
  readonly tookMs: number
}

export interface SerialGuestOptions {
  /** Its number, which is in its blocks. */
  readonly disk: number
  readonly random: Random
  /** Hears of every request of the load. */
  readonly answered: (answer: Answer) => void
}

export class SerialGuest {
  readonly #client: NbdClient
  readonly #options: SerialGuestOptions
  readonly #noise: Uint8Array
  /** The block of each write, in their order. */
  readonly #order: number[] = []
  readonly #numbers: Uint32Array
  /** Writes that were acknowledged. */
  acknowledged = 0

  /** `noise` is shared by all guests: PIECE bytes and a block. */
  constructor(client: NbdClient, noise: Uint8Array, options: SerialGuestOptions) {
    this.#client = client
    this.#noise = noise
    this.#options = options
    this.#numbers = new Uint32Array(client.size / BLOCK)
  }

  static noise(random: Random): Uint8Array {
    return random.fill(Buffer.alloc(PIECE + BLOCK))
  }

  /** Writes that were begun. */
  get begun(): number {
    return this.#order.length
  }

  /** Writes the first `length` bytes of the disk, whole pieces. */
  async fill(length: number): Promise<void> {
    const buffer = Buffer.alloc(PIECE)
    for (let offset = 0; offset < length; offset += PIECE) {
      for (let at = 0; at < PIECE; at += BLOCK) this.#stamp((offset + at) / BLOCK, buffer, at)
      await this.#client.write(offset, PIECE, buffer, 0, 0)
      this.acknowledged = this.begun
    }
    await this.#client.flush()
  }

  /** Writes a block and reads another one, so often a second, until told to stop. What is read is what was written. */
  async run(perSecond: number, signal: AbortSignal): Promise<void> {
    const { random } = this.#options
    const buffer = Buffer.alloc(BLOCK)
    const blocks = this.#numbers.length
    const everyMs = 1000 / perSecond
    await sleep(random.below(Math.ceil(everyMs)), undefined, { signal }).catch(() => undefined)
    for (let next = performance.now(); !signal.aborted; next += everyMs) {
      this.#stamp(random.below(blocks), buffer, 0)
      await this.#timed(() => this.#client.write((this.#order.at(-1) as number) * BLOCK, BLOCK, buffer, 0, 0))
      this.acknowledged = this.begun
      const block = random.below(blocks)
      await this.#timed(() => this.#client.read(block * BLOCK, BLOCK, buffer, 0))
      assert.equal(this.#numberIn(buffer, 0, block), this.#numbers[block], `disk ${this.#options.disk}, block ${block}`)
      const restMs = next + everyMs - performance.now()
      if (restMs > 0) await sleep(restMs, undefined, { signal }).catch(() => undefined)
      else next = performance.now() - everyMs
    }
  }

  /** Checks a device against what the disk was after some number of writes; returns that number. */
  async check(device: BlockDevice): Promise<number> {
    const found = new Uint32Array(this.#numbers.length)
    const buffer = Buffer.alloc(PIECE)
    for (let offset = 0; offset < device.size; offset += PIECE) {
      const length = Math.min(PIECE, device.size - offset)
      await device.read(offset, length, buffer, 0)
      for (let at = 0; at < length; at += BLOCK) {
        const block = (offset + at) / BLOCK
        found[block] = this.#numberIn(buffer, at, block)
      }
    }
    const last = found.reduce((most, number) => Math.max(most, number), 0)
    const wanted = new Uint32Array(found.length)
    for (let number = 1; number <= last; number++) wanted[this.#order[number - 1] as number] = number
    const wrong = found.findIndex((number, block) => number !== wanted[block])
    const what = `disk ${this.#options.disk} after ${last} writes, block ${wrong}: ${found[wrong]} in place of ${wanted[wrong]}`
    assert.equal(wrong, -1, what)
    return last
  }

  close(): Promise<void> {
    return this.#client.close()
  }

  async #timed(request: () => Promise<void> | undefined): Promise<void> {
    const before = performance.now()
    await request()
    const atMs = performance.now()
    this.#options.answered({ atMs, tookMs: atMs - before })
  }

  /** The next write, into a buffer. */
  #stamp(block: number, buffer: Buffer, at: number): void {
    const number = this.#order.push(block)
    this.#numbers[block] = number
    this.#noiseOf(block, number).copy(buffer, at)
    buffer.writeUInt32LE(this.#options.disk, at)
    buffer.writeUInt32LE(block, at + 4)
    buffer.writeUInt32LE(number, at + 8)
  }

  /** The number of the write that a block holds, of which every byte is checked; 0 for one that was never written. */
  #numberIn(buffer: Buffer, at: number, block: number): number {
    const number = buffer.readUInt32LE(at + 8)
    const where = `disk ${this.#options.disk}, block ${block}`
    if (number === 0) {
      assert.ok(ZEROS.compare(buffer, at, at + BLOCK) === 0, `${where}: neither written nor zeros`)
      return 0
    }
    assert.deepEqual(
      [buffer.readUInt32LE(at), buffer.readUInt32LE(at + 4)],
      [this.#options.disk, block],
      `${where} is another one`,
    )
    const noise = this.#noiseOf(block, number)
    assert.ok(noise.compare(buffer, at + HEADER, at + BLOCK, HEADER) === 0, `${where}: torn`)
    return number
  }

  #noiseOf(block: number, number: number): Buffer {
    const from = (block * 31 + number * 4099) % PIECE
    return Buffer.from(this.#noise.buffer, this.#noise.byteOffset + from, BLOCK)
  }
}
