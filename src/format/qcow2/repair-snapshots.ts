// Repairs the snapshot table of a qcow2 image: entries past its possible end are dropped, and extra data is made as long as
// version 3 demands and no longer than QEMU takes. What snapshots refer to is left as it is.

import { getUint16, getUint32, setUint32, setUint64 } from '../../base/bytes.ts'
import { roundUp } from '../../base/round.ts'
import type { HostFile } from '../../host/host.ts'
import type { Header } from './header.ts'
import { SNAPSHOT_EXTRA, SNAPSHOT_EXTRA_MAX, SNAPSHOT_FIXED } from './references.ts'
import * as spec from './spec.ts'

const EXTRA_SIZE_AT = 36
const VM_STATE_SIZE_AT = 32

/** Writes the first `count` entries, mended, to the end of the file, and leads the header in the file to them. Durable on return. */
export async function rewriteSnapshots(file: HostFile, header: Header, count: number): Promise<void> {
  const entries: Uint8Array[] = []
  let at = header.snapshotsOffset
  for (let i = 0; i < count; i++) {
    const fixed = new Uint8Array(SNAPSHOT_FIXED)
    await file.read(at, fixed.length, fixed, 0)
    const extra = getUint32(fixed, EXTRA_SIZE_AT)
    const texts = getUint16(fixed, 12) + getUint16(fixed, 14)
    entries.push(await mendedEntry(file, header, at, fixed))
    at = roundUp(at + SNAPSHOT_FIXED + extra + texts, 8)
  }
  const length = entries.reduce((sum, entry) => sum + entry.length, 0)
  const table = new Uint8Array(roundUp(length, header.clusterSize))
  let end = 0
  for (const entry of entries) {
    table.set(entry, end)
    end += entry.length
  }
  const place = count === 0 ? 0 : roundUp(file.size(), header.clusterSize)
  if (count > 0) await file.write(place, table.length, table, 0)
  await file.sync()
  const fields = new Uint8Array(12)
  setUint32(fields, 0, count)
  setUint64(fields, 4, place)
  await file.write(spec.HEADER.nb_snapshots, fields.length, fields, 0)
  await file.sync()
}

/** The entry at `at`, padded to a multiple of 8. */
async function mendedEntry(file: HostFile, header: Header, at: number, fixed: Uint8Array): Promise<Uint8Array> {
  const extra = getUint32(fixed, EXTRA_SIZE_AT)
  const texts = getUint16(fixed, 12) + getUint16(fixed, 14)
  const kept = Math.min(extra, SNAPSHOT_EXTRA_MAX)
  const length = header.version === 2 ? kept : Math.max(SNAPSHOT_EXTRA, kept)
  const entry = new Uint8Array(roundUp(SNAPSHOT_FIXED + length + texts, 8))
  entry.set(fixed)
  setUint32(entry, EXTRA_SIZE_AT, length)
  // What is missing: the size of the saved machine state, which the entry has in 32 bits, and the size of the disk.
  if (length > kept) {
    if (kept < 8) setUint64(entry, SNAPSHOT_FIXED, getUint32(fixed, VM_STATE_SIZE_AT))
    setUint64(entry, SNAPSHOT_FIXED + 8, header.size)
  }
  await file.read(at + SNAPSHOT_FIXED, kept < 8 && length > kept ? 0 : Math.min(kept, length), entry, SNAPSHOT_FIXED)
  await file.read(at + SNAPSHOT_FIXED + extra, texts, entry, SNAPSHOT_FIXED + length)
  return entry
}
