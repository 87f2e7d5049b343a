// A disk that lives at another daemon, as the one layer of its chain here: guests that stayed are passed on. While the other side is
// away requests wait, and are asked again when it is back, which NBD's requests allow. It holds no data.
//
//   guest -> Disk -> chain -> ForwardLayer -> link -> the other daemon's export of the disk
//                                  ^            |
//                                  +-- lost ----+

import { FORWARD_RETRY_MAX_MS, FORWARD_RETRY_MIN_MS } from '../base/limits.ts'
import {
  type BlockDevice,
  type Capabilities,
  type ExtentVisitor,
  type Layer,
  OWNED_DATA,
  type OwnershipVisitor,
  type Pending,
} from '../block/device.ts'
import { BlockError } from '../block/error.ts'
import type { PeerLink } from './peers.ts'

export interface ForwardOptions {
  readonly name: string
  /** The other daemon's URI. */
  readonly to: string
  /** Bytes. */
  readonly size: number
  readonly connect: () => Promise<PeerLink>
  /** One that is there already. */
  readonly link?: PeerLink | undefined
  /** Hears when the other side is away, and when it is back. */
  readonly report: (message: string) => void
}

export class ForwardLayer implements Layer {
  readonly name: string
  readonly size: number
  readonly path: string
  readonly format = 'forward'
  readonly clusterSize = 65_536
  readonly backingReference = undefined
  readonly access = 'write'
  backing: BlockDevice | undefined
  /** What the other daemon's export can, which is one of ours. */
  readonly can: Capabilities = {
    write: true,
    fua: 'native',
    zero: 'native',
    trim: 'native',
    extents: 'native',
    minimumBlock: 1,
    bestBlock: 4096,
  }
  readonly #options: ForwardOptions
  #link: PeerLink | undefined
  #connecting: Promise<PeerLink> | undefined
  #isClosed = false
  /** Rejects when the layer is closed, for what waits for another side that may never come. */
  readonly #closing = Promise.withResolvers<never>()

  constructor(options: ForwardOptions) {
    this.#options = options
    this.name = `${options.name} at ${options.to}`
    this.path = options.to
    this.size = options.size
    this.#link = options.link
    this.#closing.promise.catch(() => undefined)
  }

  read(offset: number, length: number, into: Uint8Array, at: number): Pending {
    return this.#pass((device) => device.read(offset, length, into, at))
  }

  write(offset: number, length: number, from: Uint8Array, at: number, flags: number): Pending {
    return this.#pass((device) => device.write(offset, length, from, at, flags))
  }

  zero(offset: number, length: number, flags: number): Pending {
    return this.#pass((device) => device.zero(offset, length, flags))
  }

  trim(offset: number, length: number, flags: number): Pending {
    return this.#pass((device) => device.trim(offset, length, flags))
  }

  flush(): Pending {
    return this.#pass((device) => device.flush())
  }

  /** Collected first: an answer that breaks off is asked for again from its start. */
  extents(offset: number, length: number, visit: ExtentVisitor): Pending {
    return this.#extents(offset, length, visit)
  }

  allocation(_offset: number, length: number, visit: OwnershipVisitor): Pending {
    visit(length, OWNED_DATA)
    return undefined
  }

  async setAccess(): Promise<void> {}

  async grow(): Promise<void> {
    throw new BlockError('unsupported', `${this.name}: it is resized there`)
  }

  async setBackingReference(): Promise<void> {
    throw new BlockError('unsupported', `${this.name} has no header here`)
  }

  /** What waits for the other side fails, with kind 'closed'. */
  async close(): Promise<void> {
    if (this.#isClosed) return
    this.#isClosed = true
    this.#closing.reject(this.#closedError())
    const link = this.#link
    this.#link = undefined
    link?.abandon(this.#closedError())
    await link?.device.close()
  }

  async #extents(offset: number, length: number, visit: ExtentVisitor): Promise<void> {
    const pieces: number[] = []
    await this.#pass((device) => {
      pieces.length = 0
      return device.extents(offset, length, (piece, extent) => pieces.push(piece, extent) > 0)
    })
    for (let i = 0; i < pieces.length; i += 2) if (!visit(pieces[i] as number, pieces[i + 1] as number)) return
  }

  /** Asks, and asks again over another link, until there is an answer. */
  async #pass(ask: (device: BlockDevice) => Pending): Promise<void> {
    for (;;) {
      const link = this.#link ?? (await Promise.race([(this.#connecting ??= this.#connect()), this.#closing.promise]))
      try {
        const pending = ask(link.device)
        if (pending !== undefined) await pending
        return
      } catch (error) {
        if (this.#isClosed) throw this.#closedError()
        if (link.lost() === undefined) throw error
        if (this.#link === link) {
          this.#link = undefined
          this.#options.report(`${this.name} is away, and requests wait: ${(error as Error).message}`)
        }
      }
    }
  }

  /** One attempt after another until the layer is closed. */
  async #connect(): Promise<PeerLink> {
    try {
      for (let waitMs = FORWARD_RETRY_MIN_MS; ; waitMs = Math.min(waitMs * 2, FORWARD_RETRY_MAX_MS)) {
        if (this.#isClosed) throw this.#closedError()
        try {
          return await this.#opened()
        } catch {
          await new Promise((resolve) => setTimeout(resolve, waitMs))
        }
      }
    } finally {
      this.#connecting = undefined
    }
  }

  async #opened(): Promise<PeerLink> {
    const link = await this.#options.connect()
    if (this.#isClosed || link.device.size < this.size) {
      await link.device.close()
      throw this.#closedError()
    }
    this.#link = link
    return link
  }

  #closedError(): BlockError {
    return new BlockError('closed', `${this.name} is closed`, { device: this.name })
  }
}
