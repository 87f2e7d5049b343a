// Gathers what one connection has to say and hands it to the socket in as few writes as possible. A reply is built in
// place: reserve, fill, commit; `flush` writes all that was committed. A reply that a slow request is still filling is
// detached, and sent by itself when it is ready; the order of replies is free.
//
//   bytes   | handed to the socket | committed since the last flush | reserved | free |

import type { Duplex } from 'node:stream'
import { assert } from '../base/assert.ts'
import { NBD_REPLY_BUFFER } from '../base/limits.ts'
import { SharedBuffer } from './shared-buffer.ts'

const NOTHING = new Uint8Array(0)

interface Sending {
  readonly buffer: SharedBuffer | undefined
  readonly length: number
}

export class Outbox {
  readonly #socket: Duplex
  readonly #onSent: () => void
  #buffer: SharedBuffer | undefined
  /** The bytes that `reserve` gives positions in; changes with every `reserve`. */
  bytes: Uint8Array = NOTHING
  #start = 0
  #end = 0
  readonly #sending: Sending[] = []
  #unsent = 0
  #isCorked = false
  #isDisposed = false

  /** `onSent` is called whenever the kernel has taken something. */
  constructor(socket: Duplex, onSent: () => void) {
    this.#socket = socket
    this.#onSent = onSent
  }

  /** Bytes that the kernel has not taken yet, with those that are not flushed. */
  get unsent(): number {
    return this.#unsent + this.#end - this.#start
  }

  /** Makes room for `length` bytes; returns their position in `bytes`. They count once committed. */
  reserve(length: number): number {
    if (this.#end + length > this.bytes.length) this.#renew(length)
    return this.#end
  }

  /** The first `length` bytes of what was reserved are ready. */
  commit(length: number): void {
    this.#end += length
  }

  /** Leaves the `length` bytes reserved to a slow request, which calls `send` or `release`s the buffer. */
  detach(length: number): SharedBuffer {
    this.flush()
    const buffer = this.#buffer
    assert(buffer !== undefined, 'detach follows reserve')
    this.#start = this.#end += length
    return buffer.retain()
  }

  /** Sends part of a buffer that the caller retained, together with all else that becomes ready in this turn. */
  send(buffer: SharedBuffer, at: number, length: number): void {
    this.soon()
    this.#write(buffer, buffer.bytes.subarray(at, at + length))
  }

  /** Sends bytes of the caller, who keeps them as they are until their answer comes, after what was committed. */
  sendForeign(bytes: Uint8Array): void {
    this.soon()
    this.flush()
    this.#write(undefined, bytes)
  }

  /** Flushes at the end of this turn, in one write with all that follows until then. */
  soon(): void {
    if (this.#isCorked || this.#isDisposed) return
    this.#isCorked = true
    this.#socket.cork()
    process.nextTick(this.#uncork)
  }

  /** Hands all that was committed to the socket. */
  flush(): void {
    if (this.#start === this.#end || this.#buffer === undefined) return
    const view = this.bytes.subarray(this.#start, this.#end)
    this.#start = this.#end
    this.#write(this.#buffer.retain(), view)
  }

  /** Gives the buffers back. The socket must be closed. */
  dispose(): void {
    this.#isDisposed = true
    for (const { buffer } of this.#sending.splice(0)) buffer?.release()
    this.#unsent = 0
    this.#drop()
  }

  #write(buffer: SharedBuffer | undefined, view: Uint8Array): void {
    if (this.#isDisposed) {
      buffer?.release()
      return
    }
    this.#sending.push({ buffer, length: view.length })
    this.#unsent += view.length
    this.#socket.write(view, this.#sent)
  }

  readonly #uncork = (): void => {
    this.#isCorked = false
    this.flush()
    this.#socket.uncork()
  }

  readonly #sent = (): void => {
    const sending = this.#sending.shift()
    if (sending === undefined) return
    this.#unsent -= sending.length
    sending.buffer?.release()
    if (this.#buffer !== undefined && !this.#buffer.isShared && this.#start === this.#end) {
      // All of it is free again. The same bytes are used next, since they are in the processor's cache.
      this.#start = this.#end = 0
      if (this.bytes.length > NBD_REPLY_BUFFER) this.#drop()
    }
    this.#onSent()
  }

  #renew(length: number): void {
    this.flush()
    this.#drop()
    this.#buffer = new SharedBuffer(Math.max(length, NBD_REPLY_BUFFER))
    this.bytes = this.#buffer.bytes
  }

  #drop(): void {
    this.#buffer?.release()
    this.#buffer = undefined
    this.bytes = NOTHING
    this.#start = this.#end = 0
  }
}
