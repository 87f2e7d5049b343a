// The snapshot table of a qcow2 image (specification, "Snapshots"): reads and checks it, makes an entry, and lays a table out.
// Entries are kept as the bytes that they are in the file, so that what is unknown in them survives every rewrite. What a
// snapshot shows is image.ts's work, and how one is made, applied and deleted snapshots.ts's.
//
//   entry   | 40 bytes | extra data | id | name | zeros to a multiple of 8 |        one after the other

import { getUint16, getUint32, getUint64, setUint16, setUint32, setUint64, utf8 } from '../../base/bytes.ts'
import { QCOW2_DIRECTORY_MAX, QCOW2_L1_MAX } from '../../base/limits.ts'
import { roundUp } from '../../base/round.ts'
import { BlockError } from '../../block/error.ts'
import type { HostFile } from '../../host/host.ts'
import { type Header, l1EntriesFor } from './header.ts'
import * as spec from './spec.ts'

/** An internal snapshot of a qcow2 image. */
export interface Snapshot {
  /** Unique in the image; QEMU counts from "1". */
  readonly id: string
  /** Chosen by who took it; not unique. */
  readonly name: string
  /** When it was taken: seconds since 1970 and nanoseconds of that second. */
  readonly seconds: number
  readonly nanoseconds: number
  /** How long the guest had run, in whole seconds and nanoseconds. */
  readonly vmClockSeconds: number
  readonly vmClockNanoseconds: number
  /** Bytes of saved machine state, which lies after the disk's end and is not shown. */
  readonly vmStateSize: number
  /** Instructions that the guest had run; undefined when they were not counted. */
  readonly icount: number | undefined
  /** Bytes of the disk as it was. */
  readonly diskSize: number
  /** Where its L1 table is in the file, and the number of entries. */
  readonly l1Offset: number
  readonly l1Size: number
  /** The entry as it is in the file, without the padding. */
  readonly entry: Uint8Array
}

/** What a new entry says. The rest is zero. */
export interface NewSnapshot {
  readonly id: string
  readonly name: string
  readonly takenMs: number
  readonly diskSize: number
  readonly l1Offset: number
  readonly l1Size: number
}

/** Reads the snapshot table. Kind 'invalid-format' when an entry cannot be right. */
export async function readSnapshots(file: HostFile, header: Header): Promise<Snapshot[]> {
  const snapshots: Snapshot[] = []
  const ids = new Set<string>()
  const fixed = new Uint8Array(spec.SNAPSHOT_LENGTH)
  const end = Math.min(file.size(), header.snapshotsOffset + QCOW2_DIRECTORY_MAX)
  let at = header.snapshotsOffset
  for (let index = 0; index < header.snapshotCount; index++) {
    const fail = (what: string): BlockError => {
      const message = `${file.path}: its internal snapshot number ${index + 1} ${what}; see varve image check`
      return new BlockError('invalid-format', message, { path: file.path, offset: at })
    }
    await file.read(at, fixed.length, fixed, 0)
    const length = entryLength(fixed)
    if (at + length > end) throw fail('ends after the file or the longest table')
    const entry = new Uint8Array(length)
    await file.read(at, length, entry, 0)
    const snapshot = parseEntry(entry, header)
    checkSnapshot(snapshot, header, file.size(), fail)
    if (ids.has(snapshot.id)) throw fail(`has the identifier of another one, ${JSON.stringify(snapshot.id)}`)
    ids.add(snapshot.id)
    snapshots.push(snapshot)
    at += roundUp(length, 8)
  }
  return snapshots
}

/** The table as bytes; empty for no snapshots. */
export function encodeSnapshots(snapshots: readonly Snapshot[]): Uint8Array {
  const bytes = new Uint8Array(tableLength(snapshots))
  let at = 0
  for (const { entry } of snapshots) {
    bytes.set(entry, at)
    at += roundUp(entry.length, 8)
  }
  return bytes
}

/** Bytes that the table of these snapshots takes. */
export function tableLength(snapshots: readonly Snapshot[]): number {
  return snapshots.reduce((sum, { entry }) => sum + roundUp(entry.length, 8), 0)
}

/** A new entry, of a disk without saved machine state. Id and name are at most 65,535 bytes long. */
export function newSnapshot(made: NewSnapshot, header: Header): Snapshot {
  const id = utf8.encode(made.id)
  const name = utf8.encode(made.name)
  const { SNAPSHOT, SNAPSHOT_EXTRA } = spec
  const extraAt = spec.SNAPSHOT_LENGTH
  const textAt = extraAt + spec.SNAPSHOT_EXTRA_LENGTH
  const entry = new Uint8Array(textAt + id.length + name.length)
  setUint64(entry, SNAPSHOT.l1_table_offset, made.l1Offset)
  setUint32(entry, SNAPSHOT.l1_size, made.l1Size)
  setUint16(entry, SNAPSHOT.id_str_size, id.length)
  setUint16(entry, SNAPSHOT.name_size, name.length)
  setUint32(entry, SNAPSHOT.date_sec, Math.floor(made.takenMs / 1000))
  setUint32(entry, SNAPSHOT.date_nsec, Math.floor(made.takenMs % 1000) * 1_000_000)
  setUint32(entry, SNAPSHOT.extra_data_size, spec.SNAPSHOT_EXTRA_LENGTH)
  setUint64(entry, extraAt + SNAPSHOT_EXTRA.disk_size, made.diskSize)
  // All ones: instructions were not counted.
  entry.fill(0xff, extraAt + SNAPSHOT_EXTRA.icount, textAt)
  entry.set(id, textAt)
  entry.set(name, textAt + id.length)
  return parseEntry(entry, header)
}

function entryLength(fixed: Uint8Array): number {
  const { SNAPSHOT } = spec
  const texts = getUint16(fixed, SNAPSHOT.id_str_size) + getUint16(fixed, SNAPSHOT.name_size)
  return spec.SNAPSHOT_LENGTH + getUint32(fixed, SNAPSHOT.extra_data_size) + texts
}

function parseEntry(entry: Uint8Array, header: Header): Snapshot {
  const { SNAPSHOT, SNAPSHOT_EXTRA } = spec
  const field = (name: keyof typeof SNAPSHOT): number => getUint32(entry, SNAPSHOT[name])
  const extraLength = field('extra_data_size')
  const extra = (name: keyof typeof SNAPSHOT_EXTRA): number | undefined => {
    const at = SNAPSHOT_EXTRA[name]
    return at + 8 <= extraLength ? getUint64(entry, spec.SNAPSHOT_LENGTH + at) : undefined
  }
  const idAt = spec.SNAPSHOT_LENGTH + extraLength
  const nameAt = idAt + getUint16(entry, SNAPSHOT.id_str_size)
  const clock = Buffer.from(entry.buffer, entry.byteOffset).readBigUInt64BE(SNAPSHOT.vm_clock_nsec)
  const icount = extra('icount')
  return {
    id: utf8.decode(entry.subarray(idAt, nameAt)),
    name: utf8.decode(entry.subarray(nameAt)),
    seconds: field('date_sec'),
    nanoseconds: field('date_nsec'),
    vmClockSeconds: Number(clock / 1_000_000_000n),
    vmClockNanoseconds: Number(clock % 1_000_000_000n),
    vmStateSize: extra('vm_state_size_large') ?? field('vm_state_size'),
    icount: icount === -1 ? undefined : icount,
    // Version 2 may not say it; the disk cannot have been resized since.
    diskSize: extra('disk_size') ?? header.size,
    l1Offset: getUint64(entry, SNAPSHOT.l1_table_offset),
    l1Size: field('l1_size'),
    entry,
  }
}

function checkSnapshot(snapshot: Snapshot, header: Header, fileSize: number, fail: (what: string) => BlockError): void {
  const { l1Offset, l1Size, diskSize, vmStateSize } = snapshot
  const bytes = l1Size * spec.ENTRY_SIZE
  if (bytes > QCOW2_L1_MAX) throw fail(`has an L1 table of ${l1Size} entries, above the limit`)
  const isPlaced = l1Offset >= header.clusterSize && l1Offset % header.clusterSize === 0 && l1Offset + bytes <= fileSize
  if (l1Size > 0 && !isPlaced) throw fail(`has its L1 table at ${l1Offset}, where it cannot be`)
  if (diskSize < 0 || vmStateSize < 0) throw fail('has a size above 2^53 bytes')
  if (l1Size < l1EntriesFor(diskSize, header.clusterSize, header.l2EntrySize))
    throw fail(`has ${l1Size} L1 entries, too few for its ${diskSize} bytes`)
}
