// Guests that may live on when this host goes down: those that came over TCP. A guest is never told that its server died; when the
// host lost power or crashed, writes that it counts as done may be lost, and going on would corrupt what it believes to have. So the
// catalog remembers which disks had such a client, and after an unclean stop of the host they are held: not served on TCP until
// somebody says so. Guests on the Unix socket went down with the host.
//
//   none --enters--> remembered --opened after a clean close--> none
//                    remembered --opened after the host stopped uncleanly--> held --released--> none

import type { Pending } from '../block/device.ts'
import { BlockError } from '../block/error.ts'
import type { Catalog, CatalogChange, DiskRecord } from './catalog.ts'
import type { EngineContext } from './context.ts'

/** A disk is being opened: `isClean` when it was closed cleanly the last time, with all that was acknowledged durable. */
export async function settleGuest(
  { catalog, host, report }: Pick<EngineContext, 'catalog' | 'host' | 'report'>,
  { id, name }: DiskRecord,
  isClean: boolean,
): Promise<void> {
  const guest = catalog.get('guest', id)
  if (guest === undefined) return
  if (guest.heldMs === undefined) {
    if (isClean) return catalog.commit([{ remove: 'guest', id }])
    if (guest.bootId === host.bootId()) return
    await catalog.commit([{ put: 'guest', record: { ...guest, heldMs: Date.now() } }])
  }
  report(`${name}: ${whyHeld(name)}`)
}

function whyHeld(disk: string): string {
  return (
    `the host stopped uncleanly while a client on TCP had the disk, whose last writes may be lost; it is not served on TCP. ` +
    `When its guest has been stopped or restarted: varve disk release ${disk}`
  )
}

/** For the one place where clients come in over TCP. */
export class DistantGuests {
  readonly #catalog: Pick<Catalog, 'get' | 'list'>
  readonly #commit: (changes: readonly CatalogChange[]) => Promise<void>
  readonly #bootId: string
  /** Disks, by id, that are being noted. */
  readonly #noting = new Map<string, Promise<void>>()

  constructor(
    catalog: Pick<Catalog, 'get' | 'list'>,
    commit: (changes: readonly CatalogChange[]) => Promise<void>,
    bootId: string,
  ) {
    this.#catalog = catalog
    this.#commit = commit
    this.#bootId = bootId
  }

  /** A client is about to use a disk: no request of it may be served before this is done. Other names are none of ours. */
  enters(disk: string): Pending {
    const id = this.#idOf(disk)
    if (id === undefined) return undefined
    const noting = this.#noting.get(id)
    if (noting !== undefined) return noting
    if (this.#catalog.get('guest', id)?.bootId === this.#bootId) return undefined
    const noted = this.#commit([{ put: 'guest', record: { id, bootId: this.#bootId } }]).finally(() =>
      this.#noting.delete(id),
    )
    this.#noting.set(id, noted)
    return noted
  }

  /** Why a disk is not served on TCP; undefined when it is. */
  refusal(disk: string): string | undefined {
    const id = this.#idOf(disk)
    const isHeld = id !== undefined && this.#catalog.get('guest', id)?.heldMs !== undefined
    return isHeld ? whyHeld(disk) : undefined
  }

  /** Serves a held disk on TCP again. Kind 'invalid-argument' when it is not held. */
  async release(disk: string): Promise<void> {
    const id = this.#idOf(disk)
    if (id === undefined || this.refusal(disk) === undefined)
      throw new BlockError('invalid-argument', `disk ${disk} is not held: clients on TCP are served`, { device: disk })
    await this.#commit([{ remove: 'guest', id }])
  }

  #idOf(disk: string): string | undefined {
    return this.#catalog.list('disk').find(({ name }) => name === disk)?.id
  }
}
