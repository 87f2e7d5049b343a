// The target's side of a migration: a disk that is being copied to here, and what its source asks by the token. One table says what may
// be asked in which state; everything may be asked again. Until the disk is taken, only the token's holder can use it.
//
//   prepare -> copying --seal--> sealed --take--> taken --release--> taken, token forgotten
//                 |                |
//                 +----refuse------+--> unknown
//
// docs/internals/migration.md has the source's side of it, and what is so after a crash.

import { randomBytes } from 'node:crypto'
import path from 'node:path'
import { BlockError } from '../block/error.ts'
import { createQcow2 } from '../format/qcow2/create.ts'
import { createRaw } from '../format/raw/raw.ts'
import { type IncomingMark, identityOf } from './authority.ts'
import { BitmapReceiver } from './bitmap-transfer.ts'
import type { CatalogChange, DiskRecord, LayerRecord } from './catalog.ts'
import { checkName, type EngineContext, findAny, type ManagedDisk } from './context.ts'
import { serveManaged } from './disk-opener.ts'
import {
  type BitmapPiece,
  type BitmapShape,
  type IncomingReply,
  type IncomingRequest,
  type IncomingState,
  type IncomingStep,
  MIGRATION_PROTOCOL,
} from './peers.ts'
import { removeFolder } from './removal.ts'
import { resizeDisk } from './resize.ts'
import { LocalSnapshotParty, snapshotTogether } from './snapshot-party.ts'
import { removeGarbage } from './snapshots.ts'

type StepName = IncomingStep['step']
type OpenNew = (record: DiskRecord, besides: readonly CatalogChange[]) => Promise<void>

/** What may be asked in which state. */
const STEPS: Readonly<Record<IncomingState, readonly StepName[]>> = {
  unknown: ['state', 'refuse', 'release'],
  copying: ['state', 'freeze', 'bits', 'seal', 'refuse'],
  sealed: ['state', 'bits', 'seal', 'take', 'refuse'],
  // A refusal that comes too late is answered, not obeyed.
  taken: ['state', 'take', 'refuse', 'release'],
}

/** Kinds 'unsupported' for another version, 'invalid-argument' for the source itself and what cannot be. */
export function checkIncoming({ catalog }: EngineContext, request: IncomingRequest): void {
  const { protocol, disk, home } = request
  if (protocol !== MIGRATION_PROTOCOL) {
    const message = `this daemon migrates by protocol ${MIGRATION_PROTOCOL}, the other one by ${protocol}: run the same version of Varve on both`
    throw new BlockError('unsupported', message)
  }
  if (home === identityOf(catalog)) {
    const message = `the target is the daemon that has disk ${disk}: name another one, or varve mirror for another place here`
    throw new BlockError('invalid-argument', message)
  }
  checkName('disk', disk)
}

/** The disks that are being copied to here, with what of them is in memory only. */
export class Incoming {
  readonly #context: EngineContext
  /** Gives an incoming disk up: its record goes, and its files. */
  readonly #drop: (name: string) => Promise<void>
  /** By token. */
  readonly #bits = new Map<string, BitmapReceiver>()

  constructor(context: EngineContext, drop: (name: string) => Promise<void>) {
    this.#context = context
    this.#drop = drop
  }

  /** Makes a disk with one empty image, which only the token's holder can use. `openNew` takes it into the catalog, with other changes, and serves it. */
  async make(request: IncomingRequest, openNew: OpenNew): Promise<DiskRecord> {
    const { host, catalog } = this.#context
    const { disk: name, format, size, cache, token, from } = request
    const image = await this.#freeImage(request)
    const incoming: IncomingMark = { token, from, sealed: false }
    const layers: LayerRecord[] = [{ path: image, format, made: true }]
    const id = randomBytes(8).toString('hex')
    const record: DiskRecord = { id, name, layers, addedMs: Date.now(), nextOverlay: 1, cache, incoming }
    await catalog.commit([{ put: 'garbage', record: { id: image, disk: id } }])
    try {
      if (format === 'raw') await createRaw(host, image, size)
      else await createQcow2(host, image, { size })
      await openNew(record, [{ remove: 'garbage', id: image }])
    } catch (error) {
      await removeFolder(this.#context, record)
      await removeGarbage(this.#context, image)
      throw error
    }
    return record
  }

  /** Where the image is made. Kind 'exists' when there is something. */
  async #freeImage({ image, disk, format }: IncomingRequest): Promise<string> {
    const { host, home } = this.#context
    if (image !== undefined && !path.isAbsolute(image))
      throw new BlockError('invalid-argument', `${image}: the image at the target needs an absolute path`)
    if (image === undefined) await host.makeFolder(home.imageFolder)
    const file = image ?? path.join(home.imageFolder, `${disk}.${format}`)
    const folder = path.dirname(file)
    if ((await host.status(folder))?.kind !== 'folder')
      throw new BlockError('not-found', `the folder ${folder} does not exist at the target`, { path: folder })
    const real = path.join(await host.realPath(folder), path.basename(file))
    if ((await host.status(real)) === undefined) return real
    throw new BlockError('exists', `${real} is there already at the target: name another place with --image`)
  }

  /** What is so now. */
  reply(record: DiskRecord | undefined): IncomingReply {
    const layers = record?.layers ?? []
    const snapshots = layers.flatMap(({ snapshot }) => (snapshot === undefined ? [] : [snapshot.name]))
    return { home: identityOf(this.#context.catalog), state: stateOf(record), snapshots }
  }

  /** Does one step for a disk of this engine. Kind 'busy' for a step that its state does not allow. */
  async step(record: DiskRecord, token: string, step: IncomingStep): Promise<IncomingReply> {
    const state = stateOf(record)
    if (!STEPS[state].includes(step.step))
      throw new BlockError('busy', `disk ${record.name} at the target is ${state}: ${step.step} is not possible now`)
    if (step.step === 'state' || (step.step === 'refuse' && state === 'taken')) return this.reply(record)
    if (step.step === 'refuse') {
      await this.#drop(record.name)
      this.#bits.delete(token)
      return this.reply(undefined)
    }
    const managed = findAny(this.#context, record.name)
    switch (step.step) {
      case 'freeze':
        await this.#freeze(managed, step)
        break
      case 'bits':
        this.#keep(managed, token, step)
        break
      case 'seal':
        await this.#seal(managed, token, step)
        break
      case 'take':
        await this.take(managed)
        break
      case 'release':
        await this.release(managed)
    }
    return this.reply(managed.record)
  }

  /** The disk is ours from here on: one transaction. Then its guests are served. */
  take(managed: ManagedDisk): Promise<void> {
    return managed.control.run(async () => {
      const { incoming, ...rest } = managed.record
      if (incoming === undefined) return
      const next: DiskRecord = { ...rest, arrival: { token: incoming.token, from: incoming.from } }
      await this.#save(managed, next)
      this.#bits.delete(incoming.token)
      try {
        const { served } = await serveManaged(this.#context, managed.disk, rest)
        managed.served = served
      } catch (error) {
        this.#context.report(`${next.name} has arrived, and is served after a restart: ${(error as Error).message}`)
      }
      this.#context.report(`${next.name} has arrived from ${incoming.from}`)
    })
  }

  /** The source is done with the token, or given up for lost. */
  release(managed: ManagedDisk): Promise<void> {
    return managed.control.run(async () => {
      const { arrival, ...next } = managed.record
      if (arrival === undefined) return
      await this.#save(managed, next)
      const served = managed.peerServed
      managed.peerServed = undefined
      await served?.close()
    })
  }

  async #freeze(
    managed: ManagedDisk,
    { snapshot, createdMs, size }: IncomingStep & { readonly step: 'freeze' },
  ): Promise<void> {
    const context = this.#context
    const isThere = managed.record.layers.some((layer) => layer.snapshot?.name === snapshot)
    if (!isThere) {
      const party = new LocalSnapshotParty(context, managed, createdMs)
      await snapshotTogether([party], snapshot, (changes) => context.catalog.commit(changes))
    }
    if (size > managed.disk.size) await resizeDisk(context, managed, size)
  }

  #keep(managed: ManagedDisk, token: string, step: IncomingStep & { readonly step: 'bits' }): void {
    const kept = this.#bits.get(token)
    const receiver = step.anew || kept === undefined ? new BitmapReceiver(managed.disk.size) : kept
    this.#bits.set(token, receiver)
    if (step.anew) receiver.expect(step.shapes)
    receiver.take(step.pieces)
  }

  async #seal(managed: ManagedDisk, token: string, step: IncomingStep & { readonly step: 'seal' }): Promise<void> {
    await managed.control.run(async () => {
      const { disk, record } = managed
      const { incoming } = record
      if (incoming === undefined) return
      await this.#putBitmaps(managed, token, step.shapes, step.pieces)
      const flushed = disk.flush()
      if (flushed !== undefined) await flushed
      const lost = step.bitmapsLost === undefined ? {} : { bitmapsLost: step.bitmapsLost }
      await this.#save(managed, { ...record, ...lost, incoming: { ...incoming, sealed: true } })
    })
  }

  /** What the log records of the copy's own writes is none of the guest's, so all that is there is replaced. */
  async #putBitmaps(
    { disk }: ManagedDisk,
    token: string,
    shapes: readonly BitmapShape[],
    pieces: readonly BitmapPiece[],
  ): Promise<void> {
    const receiver = this.#bits.get(token) ?? new BitmapReceiver(disk.size)
    receiver.take(pieces)
    const changes = receiver.changes(shapes, disk.log.bitmaps)
    if (changes.length > 0) await disk.log.edit(changes)
  }

  async #save(managed: ManagedDisk, record: DiskRecord): Promise<void> {
    await this.#context.catalog.commit([{ put: 'disk', record }])
    managed.record = record
  }
}

function stateOf(record: DiskRecord | undefined): IncomingState {
  if (record === undefined) return 'unknown'
  if (record.incoming !== undefined) return record.incoming.sealed ? 'sealed' : 'copying'
  return record.arrival === undefined ? 'unknown' : 'taken'
}
