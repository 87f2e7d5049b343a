// One request of the client, from the caller's call to its end; it outlives connections, since it is sent again after a
// reconnect. Collects the chunks of its reply and knows when they are complete.

import { NBD_STATUS_REPLY_MAX } from '../base/limits.ts'
import type { BlockError } from '../block/error.ts'
import { NBD_CMD_BLOCK_STATUS, NBD_CMD_READ } from './spec.ts'

/** Pieces of a read that arrived out of order are remembered up to this number. */
const PIECES_MAX = 1024

export interface RequestFields {
  readonly type: number
  readonly flags: number
  readonly offset: number
  readonly length: number
  /** A read's or write's data. */
  readonly bytes?: Uint8Array
  readonly at?: number
  /** The metadata context that a block status asks for. */
  readonly context?: string
}

export class ClientRequest {
  readonly type: number
  readonly flags: number
  readonly offset: number
  readonly length: number
  readonly bytes: Uint8Array | undefined
  readonly at: number
  readonly context: string
  /** Numbers the client's requests in 32 bits; sent as half of the cookie. */
  readonly sequence: number
  /** A block status reply: pairs of length in bytes and status. */
  extents: number[] = []
  /** What an error chunk said; the request fails with it when the reply is complete. */
  error: BlockError | undefined
  readonly promise: Promise<void>
  readonly #settle: { readonly resolve: () => void; readonly reject: (error: BlockError) => void }
  /** Parts of a read that arrived: starts and ends relative to `offset`, neighbours joined. */
  #pieces: [number, number][] = []

  constructor(fields: RequestFields, sequence: number) {
    this.type = fields.type
    this.flags = fields.flags
    this.offset = fields.offset
    this.length = fields.length
    this.bytes = fields.bytes
    this.at = fields.at ?? 0
    this.context = fields.context ?? ''
    this.sequence = sequence
    const { promise, resolve, reject } = Promise.withResolvers<void>()
    this.promise = promise
    this.#settle = { resolve, reject }
  }

  /** Forgets what a lost connection has answered. */
  restart(): void {
    this.extents = []
    this.error = undefined
    this.#pieces = []
  }

  /** Accepts a piece of a read's data; false when it lies outside the request or was there before. */
  accept(offset: number, length: number): boolean {
    const start = offset - this.offset
    const end = start + length
    if (this.type !== NBD_CMD_READ || start < 0 || length <= 0 || end > this.length) return false
    for (const [from, to] of this.#pieces) if (start < to && from < end) return false
    const last = this.#pieces.at(-1)
    if (last !== undefined && last[1] === start) last[1] = end
    else this.#pieces.push([start, end])
    return this.#pieces.length <= PIECES_MAX
  }

  /** Takes one context's answer; false when it is no answer to the request. */
  acceptStatus(extents: number[]): boolean {
    if (this.type !== NBD_CMD_BLOCK_STATUS || this.extents.length > 0) return false
    if (extents.length === 0 || extents.length * 4 > NBD_STATUS_REPLY_MAX) return false
    this.extents = extents
    return true
  }

  /** True when a successful reply may end here. */
  get isComplete(): boolean {
    if (this.type === NBD_CMD_BLOCK_STATUS) return this.extents.length > 0
    if (this.type !== NBD_CMD_READ) return true
    let covered = 0
    for (const [from, to] of this.#pieces) covered += to - from
    return covered === this.length
  }

  resolve(): void {
    this.#settle.resolve()
  }

  reject(error: BlockError): void {
    this.#settle.reject(error)
  }
}
