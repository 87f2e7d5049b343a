// Snapshots of one disk or of many at one moment, all or none. Every disk prepares its overlay, then all are held at once, one
// transaction of the catalog takes all of them, and they go on. Whatever fails before the transaction is undone everywhere; a
// thread that dies after it opens its disks with what the catalog says. A party is one disk's side of it, here or in another thread.
//
//   prepare   a b c        overlays are made, nothing waits
//   freeze    a b c        no request is in flight on any of them: the moment
//   commit      *
//   apply     a b c        writes go to the overlays

import { BlockError } from '../block/error.ts'
import type { Layer } from '../block/device.ts'
import { snapshotBelow } from './branches.ts'
import type { CatalogChange, DiskRecord, LayerRecord } from './catalog.ts'
import { refuseConflict } from './conflicts.ts'
import { checkName, type EngineContext, type ManagedDisk } from './context.ts'
import { checkNewSnapshot, prepareOverlay, removeGarbage, type SnapshotInfo } from './snapshots.ts'

export interface NewSnapshot extends SnapshotInfo {
  readonly disk: string
}

/** What the catalog is to say of a disk that is held. */
export interface FrozenDisk {
  readonly changes: readonly CatalogChange[]
  readonly snapshot: NewSnapshot
}

export interface SnapshotParty {
  readonly disk: string
  /** Makes the overlay; nobody else changes the chain until `apply` or `undo`. Kinds 'exists' for a name in use, 'busy'. */
  prepare(name: string): Promise<void>
  /** Holds the guest. Kind 'timeout' when its requests in flight do not end. */
  freeze(): Promise<FrozenDisk>
  /** The catalog has it: writes go to the overlay. */
  apply(): Promise<void>
  /** All is as before. Also for a party that failed, or that did nothing yet. */
  undo(): Promise<void>
}

/** Takes a snapshot of all parties' disks at one moment; `commit` makes one transaction. When it fails there is none of any. */
export async function snapshotTogether(
  parties: readonly SnapshotParty[],
  name: string,
  commit: (changes: readonly CatalogChange[]) => Promise<void>,
): Promise<NewSnapshot[]> {
  // In the order of names: two that want the same disks wait for each other at the first, not crosswise.
  const inOrder = parties.toSorted((a, b) => (a.disk < b.disk ? -1 : 1))
  for (const [index, { disk }] of inOrder.entries()) {
    if (disk === inOrder[index + 1]?.disk) throw new BlockError('invalid-argument', `disk ${disk} is named twice`)
  }
  let frozen: readonly FrozenDisk[]
  try {
    for (const party of inOrder) await party.prepare(name)
    // All answers are waited for: what is undone is no longer under way.
    const answers = await Promise.allSettled(inOrder.map((party) => party.freeze()))
    frozen = answers.map((answer) => {
      if (answer.status === 'rejected') throw answer.reason
      return answer.value
    })
    await commit(frozen.flatMap(({ changes }) => changes))
  } catch (error) {
    await Promise.allSettled(inOrder.map((party) => party.undo()))
    throw error
  }
  // A thread that dies now takes the snapshot from the catalog when it starts again.
  await Promise.allSettled(inOrder.map((party) => party.apply()))
  return parties.flatMap(({ disk }) => frozen.flatMap(({ snapshot }) => (snapshot.disk === disk ? [snapshot] : [])))
}

/** The party of a disk in this thread. */
export class LocalSnapshotParty implements SnapshotParty {
  readonly disk: string
  readonly #context: EngineContext
  readonly #managed: ManagedDisk
  readonly #createdMs: number | undefined
  #name = ''
  #hasControl = false
  #overlay: Layer | undefined
  #isDrained = false
  /** The layer that was active, once it takes no writes any more. */
  #frozen: Layer | undefined
  #next: DiskRecord | undefined

  /** `createdMs` is when the snapshot was taken, for one that comes from another daemon. */
  constructor(context: EngineContext, managed: ManagedDisk, createdMs?: number) {
    this.disk = managed.record.name
    this.#context = context
    this.#managed = managed
    this.#createdMs = createdMs
  }

  async prepare(name: string): Promise<void> {
    checkName('snapshot', name)
    await this.#managed.control.acquire()
    this.#hasControl = true
    this.#name = name
    checkNewSnapshot(this.#managed.record, name)
    refuseConflict(this.#context, this.disk, 'snapshot create')
    const { overlay } = await prepareOverlay(this.#context, this.#managed, this.#managed.disk.chain.active)
    this.#overlay = overlay
  }

  async freeze(): Promise<FrozenDisk> {
    const { disk, record } = this.#managed
    const overlay = this.#prepared()
    // Most of the flush happens before the guest has to wait for the rest.
    const flushed = disk.flush()
    if (flushed !== undefined) await flushed
    await disk.drain()
    this.#isDrained = true
    const { active } = disk.chain
    await active.setAccess('read')
    this.#frozen = active
    await overlay.setAccess('write')
    const createdMs = this.#createdMs ?? Date.now()
    const top = record.layers.at(-1) as LayerRecord
    const layers = [
      ...record.layers.slice(0, -1),
      { ...top, snapshot: { name: this.#name, createdMs } },
      { path: overlay.path, format: 'qcow2', made: true as const },
    ]
    const next = { ...record, layers }
    this.#next = next
    const after = snapshotBelow(next, top.path)
    return {
      changes: [
        { put: 'disk', record: next },
        { remove: 'garbage', id: overlay.path },
      ],
      snapshot: { disk: this.disk, name: this.#name, createdMs, path: top.path, after, inChain: true },
    }
  }

  async apply(): Promise<void> {
    const { disk } = this.#managed
    if (this.#next !== undefined) this.#managed.record = this.#next
    disk.chain.replaceLayers([...disk.chain.layers, this.#prepared()])
    this.#letGo()
  }

  async undo(): Promise<void> {
    try {
      await this.#frozen?.setAccess('write')
    } finally {
      const overlay = this.#overlay
      this.#letGo()
      if (overlay !== undefined) {
        await overlay.close()
        await removeGarbage(this.#context, overlay.path)
      }
    }
  }

  #prepared(): Layer {
    if (this.#overlay !== undefined) return this.#overlay
    throw new BlockError('closed', `disk ${this.disk} does not take part in a snapshot any more`)
  }

  #letGo(): void {
    if (this.#isDrained) this.#managed.disk.undrain()
    if (this.#hasControl) this.#managed.control.release()
    this.#isDrained = false
    this.#hasControl = false
    this.#overlay = undefined
    this.#frozen = undefined
  }
}
