// The bitmaps that users keep of a disk: which granules changed since a moment of their choosing. Several edits are made at one moment,
// all or none, while the guest is held for as long as a flush takes. Those that Varve keeps for itself have a colon in their
// names and are none of the user's: backup:..., job:...

import { GRANULE_MAX, USER_GRANULE_MIN } from '../base/limits.ts'
import { isPowerOfTwo } from '../base/round.ts'
import { BlockError } from '../block/error.ts'
import type { Disk } from '../chain/disk.ts'
import type { BitmapChange, Durability, LoggedBitmap } from '../dirtylog/dirty-log.ts'
import { isOfBackups, pendingBackups, USER_BITMAP_META } from './backup-party.ts'
import { isCheckpoint } from './checkpoints.ts'
import { checkName, type ManagedDisk } from './context.ts'

/** What a user can do with bitmaps; as QMP's block-dirty-bitmap commands. */
export type BitmapEdit =
  | {
      readonly edit: 'add'
      readonly name: string
      /** Bytes, a power of two from 4 KiB to 2 GiB; 4 KiB, or that of `from`, unless told. */
      readonly granule?: number | undefined
      /** Unless told it records from now on. */
      readonly disabled?: boolean | undefined
      /** A bitmap whose granules it has set to begin with. */
      readonly from?: string | undefined
      /** What it outlives; as the disk's own bitmaps unless told. */
      readonly durability?: Durability | undefined
    }
  | { readonly edit: 'remove' | 'clear' | 'enable' | 'disable'; readonly name: string }
  | { readonly edit: 'rename'; readonly name: string; readonly to: string }
  | { readonly edit: 'merge'; readonly name: string; readonly into: string }

/** How two bitmaps of a disk differ, in bytes of the disk. */
export interface BitmapComparison {
  readonly both: number
  readonly onlyFirst: number
  readonly onlySecond: number
}

/**
 * Makes the edits at one moment, all or none, and resolves when they are durable. Kinds 'not-found', 'exists', 'invalid-argument'; 'timeout'
 * when the guest's requests in flight do not end.
 */
export function editBitmaps(managed: ManagedDisk, edits: readonly BitmapEdit[]): Promise<void> {
  const { disk } = managed
  return managed.control.run(async () => {
    for (const edit of edits) checkEdit(edit)
    // A bitmap begins with what is on stable storage: what a power loss takes back after that would differ without a bit. Most of
    // the flush happens before the guest has to wait for the rest.
    await disk.flush()
    await disk.drain()
    let durable: Promise<void>
    try {
      await disk.chain.flush()
      durable = disk.log.edit(edits.flatMap((edit) => changesOf(managed, edit)))
      durable.catch(() => undefined)
    } finally {
      disk.undrain()
    }
    await durable
  })
}

/** Kind 'not-found' when one of them is not there. */
export function compareBitmaps({ disk }: ManagedDisk, first: string, second: string): BitmapComparison {
  const pair = [find(disk, first).bits, find(disk, second).bits] as const
  const granule = Math.max(pair[0].granule, pair[1].granule)
  const one = pair[0].inGranules(granule)
  const other = pair[1].inGranules(granule)
  const all = one.copy()
  all.or(other)
  const onlySecond = all.copy()
  onlySecond.andNot(one)
  const onlyFirst = all.copy()
  onlyFirst.andNot(other)
  return {
    both: all.bytes - onlyFirst.bytes - onlySecond.bytes,
    onlyFirst: onlyFirst.bytes,
    onlySecond: onlySecond.bytes,
  }
}

function checkEdit(edit: BitmapEdit): void {
  for (const name of namesOf(edit)) {
    if (name.includes(':') && !(edit.edit === 'remove' && isRemovable(name))) {
      const message = `bitmap "${name}" is Varve's own: it keeps those with a colon for its backups and jobs. Copy it with --from`
      throw new BlockError('invalid-argument', message)
    }
  }
  if (edit.edit === 'add') checkName('bitmap', edit.name)
  if (edit.edit === 'rename') checkName('bitmap', edit.to)
  const granule = edit.edit === 'add' ? edit.granule : undefined
  if (granule === undefined) return
  if (isPowerOfTwo(granule) && granule >= USER_GRANULE_MIN && granule <= GRANULE_MAX) return
  throw new BlockError('invalid-argument', `a granule of ${granule} bytes: use a power of two from 4 KiB to 2 GiB`)
}

/** Of Varve's own those that say since when: without one the next backup there is a full, by comparison where it can be. */
function isRemovable(name: string): boolean {
  return isCheckpoint(name) || isOfBackups(name)
}

/** Those that the edit changes; what it only reads may be Varve's own. */
function namesOf(edit: BitmapEdit): string[] {
  if (edit.edit === 'merge') return [edit.into]
  return edit.edit === 'rename' ? [edit.name, edit.to] : [edit.name]
}

function changesOf(managed: ManagedDisk, edit: BitmapEdit): BitmapChange[] {
  const { name } = edit
  const { disk } = managed
  switch (edit.edit) {
    case 'add':
      return addition(managed, edit)
    case 'enable':
    case 'disable':
      return [{ kind: 'record', name, on: edit.edit === 'enable' }]
    case 'rename':
      return [{ kind: 'rename', name, to: edit.to }]
    case 'merge':
      return [{ kind: 'merge', from: name, into: edit.into }]
    case 'remove':
      if (isRemovable(name)) refuseUnfinished(disk, name)
      return [{ kind: 'remove', name }]
    case 'clear':
      return [{ kind: edit.edit, name }]
  }
}

/** A checkpoint is there once its backup is done, and a backup that is under way is to find its bits. */
function refuseUnfinished(disk: Disk, name: string): void {
  find(disk, name)
  const isUnderWay = pendingBackups(disk).some(({ bitmap }) => bitmap === name)
  if (!isUnderWay) return
  throw new BlockError('busy', `disk ${disk.name}: the backup of ${name} is under way: cancel that`)
}

function addition({ disk, record }: ManagedDisk, edit: BitmapEdit & { readonly edit: 'add' }): BitmapChange[] {
  const { name, from, durability = record.durability } = edit
  const granule = edit.granule ?? (from === undefined ? undefined : find(disk, from).bits.granule)
  const added: BitmapChange = {
    kind: 'add',
    name,
    ...(granule === undefined ? {} : { granule }),
    ...(durability === undefined ? {} : { durability }),
    recording: edit.disabled !== true,
    fill: 'none',
    meta: USER_BITMAP_META,
  }
  // By a merge, which makes the copy of a void bitmap void.
  return from === undefined ? [added] : [added, { kind: 'merge', from, into: name }]
}

function find(disk: Disk, name: string): LoggedBitmap {
  const bitmap = disk.log.bitmaps.get(name)
  if (bitmap !== undefined) return bitmap
  throw new BlockError('not-found', `disk ${disk.name} has no bitmap "${name}": varve bitmap list ${disk.name}`)
}
