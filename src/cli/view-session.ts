// A view of a daemon's disks, as a client has it that backs them up to a target of its own, from the same host or another: opened by the API,
// read over NBD through the API's door, so that one port, one certificate and one token do. A connection that is lost comes back
// within the lease and goes on; past it, or when the client is gone, the daemon ends the view and the bits are back.

import { setTimeout as delay } from 'node:timers/promises'
import type { ApiClient } from '../api/client.ts'
import { makePeer, type Peer } from '../api/peer.ts'
import type { BodyInput } from '../api/schema.ts'
import { VIEW_BEATS, VIEW_COMPLETE_MS, VIEW_COMPLETE_TRIES, VIEW_CONNECTIONS } from '../base/limits.ts'
import { BlockError, isBlockError } from '../block/error.ts'
import { dirtyBits, NbdView } from '../job/nbd-view.ts'
import { connectNbd } from '../nbd/client.ts'
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
  readonly views: readonly NbdView[]
  readonly #peer: Peer
  readonly #beat: NodeJS.Timeout

  private constructor(
    peer: Peer,
    id: string,
    disks: readonly ViewedDisk[],
    views: readonly NbdView[],
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
    const opened: NbdView[] = []
    let id: string | undefined
    try {
      const job = await peer.api.call('openView', {}, request)
      id = job.id
      const disks = job.details['exports'] as readonly ViewedDisk[]
      for (const disk of disks) opened.push(await openDistant(peer, id, disk, request.leaseMs))
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
async function openDistant(
  peer: Peer,
  view: string,
  { disk, kind, bitmap, size }: ViewedDisk,
  leaseMs: number,
): Promise<NbdView> {
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
    return new NbdView(client, kind === 'full' ? undefined : await dirtyBits(client, context))
  } catch (error) {
    await client.close()
    throw error
  }
}
