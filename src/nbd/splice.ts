// Passes a connection on to the Unix socket where the export really is. What was negotiated before the export's name was known
// (the greeting, structured replies) is said there again; then options that name the export, and with the first request all
// bytes, go both ways as they are, each side read only as fast as the other takes it. Understands no requests.
//
//   client --bytes--> connection --feed--> splice --> socket
//                         client <-------- splice <-- socket

import net from 'node:net'
import { setUint32 } from '../base/bytes.ts'
import type { Receiver } from './receiver.ts'
import { GREETING_SIZE, NBD_OPT_STRUCTURED_REPLY, NBD_OPTS_MAGIC, OPTION_REPLY_SIZE, OPTION_SIZE } from './spec.ts'

export interface SpliceStart {
  /** The Unix socket. */
  readonly socket: string
  /** The client's flags, as it sent them. */
  readonly clientFlags: number
  readonly structured: boolean
}

export class Splice {
  readonly socket: string
  readonly #client: net.Socket
  readonly #there: net.Socket
  readonly #onRoom: () => void
  readonly #resume = (): void => void this.#there.resume()
  readonly #destroy = (): void => void this.#there.destroy()
  /** Bytes of answers that the client has already had from us. */
  #skip: number

  /** `onRoom` is called when `feed` may go on after it said no. Either side's end ends both. */
  constructor(start: SpliceStart, client: net.Socket, onRoom: () => void) {
    this.socket = start.socket
    this.#client = client
    this.#onRoom = onRoom
    this.#skip = GREETING_SIZE + (start.structured ? OPTION_REPLY_SIZE : 0)
    this.#there = net.connect(start.socket)
    this.#there.write(introduction(start))
    this.#there.on('data', (chunk: Buffer) => this.#passBack(chunk))
    this.#there.on('drain', () => this.#onRoom())
    this.#there.on('error', () => client.destroy())
    this.#there.on('end', () => client.end())
    this.#there.on('close', () => client.end(() => client.destroy()))
    client.on('drain', this.#resume)
    client.on('close', this.#destroy)
  }

  /** Passes on the next `length` bytes that the client has sent; false when the other side has enough for now. */
  feed(receiver: Receiver, length: number): boolean {
    if (length === 0) return true
    const bytes = receiver.bytes.slice(receiver.start, receiver.start + length)
    receiver.start += length
    return this.#there.write(bytes)
  }

  /** Holds back what the client says from here on until `done`; when that fails the client is hung up on. */
  holdUntil(done: Promise<void>): void {
    this.#there.cork()
    done.then(
      () => this.#there.uncork(),
      () => this.#client.destroy(),
    )
  }

  /** The client has no more to say. */
  end(): void {
    this.#there.end()
  }

  /** The client turned to another export: this socket goes, the client stays. */
  drop(): void {
    this.#client.off('drain', this.#resume)
    this.#client.off('close', this.#destroy)
    this.#there.removeAllListeners()
    this.#there.on('error', () => {})
    this.#there.destroy()
  }

  #passBack(chunk: Buffer): void {
    const skipped = Math.min(this.#skip, chunk.length)
    this.#skip -= skipped
    if (skipped === chunk.length) return
    if (!this.#client.write(chunk.subarray(skipped))) this.#there.pause()
  }
}

/** The client's flags and, where they were agreed on, the option that asks for structured replies. */
function introduction({ clientFlags, structured }: SpliceStart): Uint8Array {
  const bytes = new Uint8Array(4 + (structured ? OPTION_SIZE : 0))
  setUint32(bytes, 0, clientFlags)
  if (!structured) return bytes
  setUint32(bytes, 4, NBD_OPTS_MAGIC[0])
  setUint32(bytes, 8, NBD_OPTS_MAGIC[1])
  setUint32(bytes, 12, NBD_OPT_STRUCTURED_REPLY)
  setUint32(bytes, 16, 0)
  return bytes
}
