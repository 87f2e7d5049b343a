// A view of a daemon's disks, as a client has it that backs them up to a target of its own, from the same host or another: opened by the API,
// read over NBD through the API's door, so that one port, one certificate and one token do. A connection that is lost comes back
// within the lease and goes on; past it, or when the client is gone, the daemon ends the view and the bits are back.

import { setTimeout as delay } from 'node:timers/promises'
import type { ApiClient } from '../api/client.ts'
import { makePeer, type Peer } from '../api/peer.ts'
import type { BodyInput } from '../api/schema.ts'
import {
  GRANULE,
  VIEW_BEATS,
  VIEW_COMPLETE_MS,
  VIEW_COMPLETE_TRIES,
  VIEW_CONNECTIONS,
  VIEW_TRIMS,
} from '../base/limits.ts'
import { Bitmap } from '../bitmap/bitmap.ts'
import type { ExtentVisitor, Pending } from '../block/device.ts'
import { BlockError, isBlockError } from '../block/error.ts'
import type { BackupView } from '../job/backup.ts'
import { connectNbd, type NbdClient } from '../nbd/client.ts'
import { warn } from './context.ts'

/** What a view says of each of its disks. */
export interface ViewedDisk {
  readonly disk: string
  readonly kind: 'full' | 'incremental'
  readonly reason: string
  readonly bitmap?: string
  /** What the changes are relative to. */
  readonly since?: string
  readonly size: number
}

export class ViewSession {
  readonly id: string
  readonly disks: readonly ViewedDisk[]
  readonly views: readonly DistantView[]
  readonly #peer: Peer
  readonly #beat: NodeJS.Timeout

  private constructor(
    peer: Peer,
    id: string,
    disks: readonly ViewedDisk[],
    views: readonly DistantView[],
    leaseMs: number,
  ) {
    this.#peer = peer
    this.id = id
    this.disks = disks
    this.views = views
    // While the target makes it wait it asks for nothing, and is there all the same.
    this.#beat = setInterval(() => {
      for (const view of views) view.touch()
    }, leaseMs / VIEW_BEATS)
    this.#beat.unref()
  }

  /** Takes the moment. `uri` is that of the daemon; kinds as of `openView` and of reaching it. */
  static async open(uri: string, request: BodyInput<'openView'> & { readonly leaseMs: number }): Promise<ViewSession> {
    const peer = makePeer(uri)
    const opened: DistantView[] = []
    let id: string | undefined
    try {
      const job = await peer.api.call('openView', {}, request)
      id = job.id
      const disks = job.details['exports'] as readonly ViewedDisk[]
      for (const disk of disks) opened.push(await DistantView.open(peer, id, disk, request.leaseMs))
      return new ViewSession(peer, id, disks, opened, request.leaseMs)
    } catch (error) {
      for (const view of opened) await view.close()
      if (id !== undefined) await abort(peer.api, id)
      peer.agent.destroy()
      throw error
    }
  }

  /** What is acknowledged so far is durable in the target as this part. */
  async keepPart(part: string): Promise<void> {
    for (const view of this.views) await view.settled()
    await this.#peer.api.call('stepView', { view: this.id }, { step: 'part', part })
  }

  async distrust(disk: string, reason: string): Promise<void> {
    await this.#peer.api.call('stepView', { view: this.id }, { step: 'distrust', disk, reason })
  }

  /** All of it is durable in the target: the bits count from this moment. True when the daemon has heard of it. */
  async complete(): Promise<boolean> {
    for (let left = VIEW_COMPLETE_TRIES; left > 0; left--) {
      try {
        await this.#peer.api.call('sayToJob', { job: this.id, verb: 'finalize' }, {})
        break
      } catch (error) {
        // Said before, and the answer was lost: then how it ended is to be seen.
        if (isBlockError(error, 'busy')) break
        if (!isBlockError(error, 'io') && !isBlockError(error, 'timeout')) return false
        await delay(VIEW_COMPLETE_MS)
      }
    }
    try {
      return (await this.#peer.api.follow(this.id, () => undefined)).error === undefined
    } catch {
      return false
    }
  }

  /** Gives it up; what cannot be told to the daemon ends with the lease. */
  async abort(): Promise<void> {
    await abort(this.#peer.api, this.id)
  }

  async close(): Promise<void> {
    clearInterval(this.#beat)
    for (const view of this.views) await view.close()
    this.#peer.agent.destroy()
  }
}

async function abort(api: ApiClient, id: string): Promise<void> {
  try {
    await api.call('sayToJob', { job: id, verb: 'cancel' }, {})
    await api.follow(id, () => undefined)
  } catch (error) {
    if (!isBlockError(error, 'busy')) warn(`view ${id} ends by itself: ${(error as Error).message}`)
  }
}

/** One disk of a view over NBD. */
export class DistantView implements BackupView {
  /** Which the daemon knows and this side does not. */
  readonly savedBytes = 0
  readonly scratchPeak = 0
  readonly changed: Bitmap | undefined
  readonly #client: NbdClient
  /** Ranges to give back, as offset and length, and those that are on their way. */
  readonly #queue: number[] = []
  readonly #onTheirWay = new Set<Promise<void>>()

  private constructor(client: NbdClient, changed: Bitmap | undefined) {
    this.#client = client
    this.changed = changed
  }

  static async open(
    peer: Peer,
    view: string,
    { disk, kind, bitmap, size }: ViewedDisk,
    leaseMs: number,
  ): Promise<DistantView> {
    const context = `qemu:dirty-bitmap:${bitmap}`
    const client = await connectNbd(
      { transport: 'unix', path: '', name: `${disk}@${view}` },
      {
        contexts: kind === 'full' ? [] : [context],
        reconnectMs: leaseMs,
        connections: VIEW_CONNECTIONS,
        dial: () => peer.upgrade({ kind: 'view', view, disk }),
      },
    )
    try {
      if (client.size !== size) throw new BlockError('protocol', `view ${view} shows disk ${disk} in another size`)
      return new DistantView(client, kind === 'full' ? undefined : await dirtyBits(client, context))
    } catch (error) {
      await client.close()
      throw error
    }
  }

  get size(): number {
    return this.#client.size
  }

  /** The view's block device, for whoever copies it in another way. */
  get device(): NbdClient {
    return this.#client
  }

  read(offset: number, length: number, into: Uint8Array, at: number): Pending {
    return this.#client.read(offset, length, into, at)
  }

  extents(offset: number, length: number, visit: ExtentVisitor): Pending {
    return this.#client.extents(offset, length, visit)
  }

  restrict(needed: Bitmap): void {
    const unneeded = this.changed?.copy() ?? new Bitmap(this.size)
    if (this.changed === undefined) unneeded.setAll()
    unneeded.andNot(needed)
    unneeded.runs(0, this.size, this.size, (offset, length) => this.release(offset, length) === undefined)
  }

  release(offset: number, length: number): void {
    this.#queue.push(offset, length)
    this.#sendTrims()
  }

  flushDisk(): Pending {
    return this.#client.flush()
  }

  /** Shows the daemon that its reader lives. */
  touch(): void {
    this.#client.extents(0, Math.min(GRANULE, this.size), () => false)?.catch(() => undefined)
  }

  /** Resolves when the daemon knows of all that was released. */
  async settled(): Promise<void> {
    while (this.#onTheirWay.size > 0) await Promise.race(this.#onTheirWay)
  }

  async close(): Promise<void> {
    this.#queue.length = 0
    await this.#client.close()
  }

  #sendTrims(): void {
    while (this.#queue.length > 0 && this.#onTheirWay.size < VIEW_TRIMS) {
      const [offset = 0, length = 0] = this.#queue.splice(0, 2)
      // Should it not arrive, scratch holds more than it must, and the reads that follow say what is wrong.
      const sent: Promise<void> = (this.#client.trim(offset, length, 0) ?? Promise.resolve())
        .catch(() => undefined)
        .finally(() => {
          this.#onTheirWay.delete(sent)
          this.#sendTrims()
        })
      this.#onTheirWay.add(sent)
    }
  }
}

async function dirtyBits(client: NbdClient, context: string): Promise<Bitmap> {
  const bits = new Bitmap(client.size, GRANULE)
  let position = 0
  await client.status(context, 0, client.size, (length, status) => {
    if ((status & 1) !== 0) bits.set(position, length)
    position += length
    return true
  })
  return bits
}
