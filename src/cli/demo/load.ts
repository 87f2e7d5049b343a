// The verifying load: a guest's stand-in that writes stamped blocks over NBD, reads blocks back and checks them, and keeps a
// journal of what was issued and what was acknowledged. It lives through a killed daemon by reconnecting.

import { Random } from '../../base/random.ts'
import { BlockError } from '../../block/error.ts'
import { connectNbd, type NbdClient } from '../../nbd/client.ts'
import { fillBlock, LOAD_BLOCK, readStamp } from './stamp.ts'

const WORKERS = 8
const OPERATIONS_PER_SECOND = 4000
const RECONNECT_MS = 30_000
/** Most writes go into a window that moves, as a guest's do; the rest anywhere. */
const WINDOW_BLOCKS = 256
const WINDOW_MS = 1000

/** Per load block, the sequence of its last write; a copy of the journal at one moment. */
export type Marks = Float64Array

/** What the load did in one phase. */
export interface PhaseFigures {
  readonly operations: number
  readonly seconds: number
  readonly perSecond: number
  /** Milliseconds that 99 % of the operations took at most, and the longest. */
  readonly p99Ms: number
  readonly worstMs: number
}

export class Load {
  readonly #client: NbdClient
  readonly #blocks: Float64Array
  readonly #random: Random
  readonly #issued: Marks
  readonly #acknowledged: Marks
  readonly #busy: Uint8Array
  #sequence = 0
  #running = false
  #workers: Promise<void>[] = []
  #latencies: number[] = []
  #phaseStart = performance.now()
  #windowStart = 0
  #windowSince = 0
  /** Operations due so far on the pace, and when the pace began. */
  #due = 0
  #paceStart = 0
  #failure: unknown

  private constructor(client: NbdClient, blocks: Float64Array, seed: number) {
    this.#client = client
    this.#blocks = blocks
    this.#random = new Random(seed)
    this.#issued = new Float64Array(blocks.length)
    this.#acknowledged = new Float64Array(blocks.length)
    this.#busy = new Uint8Array(blocks.length)
  }

  /** Connects to the disk. `blocks` has the offset of each block that the load may write. */
  static async connect(uri: string, blocks: Float64Array, seed: number): Promise<Load> {
    return new Load(await connectNbd(uri, { reconnectMs: RECONNECT_MS }), blocks, seed)
  }

  start(): void {
    this.#running = true
    this.#paceStart = performance.now()
    this.#due = 0
    this.#workers = Array.from({ length: WORKERS }, () => this.#work())
  }

  get isRunning(): boolean {
    return this.#running
  }

  /** Stops, waits for what is in flight, and throws what the load found wrong, if anything. */
  async stop(): Promise<void> {
    this.#running = false
    await Promise.all(this.#workers)
    this.#latencies = []
    if (this.#failure !== undefined) throw this.#failure
  }

  async close(): Promise<void> {
    await this.#client.close()
  }

  /** What was acknowledged and issued by now, per block. */
  acknowledged(): Marks {
    return this.#acknowledged.slice()
  }

  issued(): Marks {
    return this.#issued.slice()
  }

  /** Writes each block once, in order, so that the overlay of a snapshot gets all of them. */
  async sweep(): Promise<void> {
    const block = Buffer.alloc(LOAD_BLOCK)
    for (let index = 0; index < this.#blocks.length; index++) {
      if (this.#busy[index] === 0) await this.#write(index, block)
    }
  }

  /** Ends a phase: its figures, and a new count. */
  phase(): PhaseFigures {
    const now = performance.now()
    const sorted = Float64Array.from(this.#latencies).sort()
    const seconds = (now - this.#phaseStart) / 1000
    this.#latencies = []
    this.#phaseStart = now
    return {
      operations: sorted.length,
      seconds,
      perSecond: sorted.length / seconds,
      p99Ms: sorted[Math.floor(sorted.length * 0.99)] ?? 0,
      worstMs: sorted.at(-1) ?? 0,
    }
  }

  async #work(): Promise<void> {
    const block = Buffer.alloc(LOAD_BLOCK)
    while (this.#running) {
      await this.#pace()
      const index = this.#pick()
      if (this.#busy[index] === 1) continue
      const start = performance.now()
      try {
        if (this.#random.chance(0.7)) await this.#write(index, block)
        else await this.#read(index, block)
      } catch (error) {
        this.#failure ??= error
        this.#running = false
        return
      }
      this.#latencies.push(performance.now() - start)
    }
  }

  /** Waits until the next operation is due; a load that fell behind does not catch up in a burst. */
  async #pace(): Promise<void> {
    const now = performance.now()
    const onPace = ((now - this.#paceStart) / 1000) * OPERATIONS_PER_SECOND
    this.#due = Math.max(this.#due + 1, onPace - WORKERS)
    const waitMs = ((this.#due - onPace) / OPERATIONS_PER_SECOND) * 1000
    if (waitMs > 1) await new Promise((resolve) => setTimeout(resolve, waitMs))
  }

  #pick(): number {
    const now = performance.now()
    if (now - this.#windowSince > WINDOW_MS) {
      this.#windowSince = now
      this.#windowStart = this.#random.below(this.#blocks.length - WINDOW_BLOCKS)
    }
    if (this.#random.chance(0.9)) return this.#windowStart + this.#random.below(WINDOW_BLOCKS)
    return this.#random.below(this.#blocks.length)
  }

  /** One write of a block is in flight at a time, so that its stamps are acknowledged in the order of issue. */
  async #write(index: number, block: Buffer): Promise<void> {
    this.#busy[index] = 1
    const sequence = ++this.#sequence
    fillBlock(block, index, sequence)
    this.#issued[index] = sequence
    await this.#client.write(this.#blocks[index] as number, LOAD_BLOCK, block, 0, 0)
    this.#acknowledged[index] = sequence
    this.#busy[index] = 0
  }

  async #read(index: number, block: Buffer): Promise<void> {
    const oldest = this.#acknowledged[index] as number
    await this.#client.read(this.#blocks[index] as number, LOAD_BLOCK, block, 0)
    const found = readStamp(block, 0, index)
    const newest = this.#issued[index] as number
    if (found >= oldest && found <= newest) return
    const message = `load block ${index} read as write ${found}; it must be between ${oldest} and ${newest}`
    throw new BlockError('corrupt', message, { offset: this.#blocks[index] as number, length: LOAD_BLOCK })
  }
}
