// Repairs a qcow2 image that no program uses, as `qemu-img check -r` does: either leaks alone, or everything that can be
// repaired without guessing. What an entry loses is only what every reader of it loses anyway: QEMU reads an entry that leads
// past the end as zeros, and so it becomes zeros. What cannot be repaired stays as it is, and is said.
//
//   header -> [dirty bit set] -> entries -> snapshot table, bitmaps -> refcounts and copied flags -> check -> [bits cleared]
//
// A crash in between leaves an image of which a repair can be begun again.

import { getUint32, setUint32 } from '../../base/bytes.ts'
import { QCOW2_REPAIR_REACH } from '../../base/limits.ts'
import { roundUp } from '../../base/round.ts'
import type { Host, HostFile } from '../../host/host.ts'
import {
  type CheckOptions,
  type CheckResult,
  checkImage,
  clustersOf,
  findAll,
  type Findings,
  HIDING,
  type Subject,
} from './check.ts'
import { type Header, isDirty, parseHeader, readFirstCluster, writeFeatures } from './header.ts'
import { loseThePlace } from './mapping.ts'
import { type EntryFlaw, walkReferences } from './references.ts'
import { dropBitmaps, mendHeader } from './repair-header.ts'
import { findClashes, repairRefcounts } from './repair-refcounts.ts'
import { rewriteSnapshots } from './repair-snapshots.ts'
import * as spec from './spec.ts'

/** Rounds of one repair, at most. */
const ROUNDS_MAX = 4

export type RepairKind = 'leaks' | 'all'

/** What the image is after the repair, and what was repaired. */
export interface RepairResult extends CheckResult {
  readonly corruptionsFixed: number
  readonly leaksFixed: number
  /** What was found before the repair, the first few. */
  readonly found: readonly string[]
}

/**
 * Repairs the image at `path`; durable on return. Kinds: 'busy' when somebody uses it, 'permission', 'not-found', and
 * 'invalid-format' or 'unsupported' for a header that cannot be repaired; 'no-space'.
 */
export async function repairQcow2(
  host: Host,
  path: string,
  what: RepairKind,
  options: CheckOptions = {},
): Promise<RepairResult> {
  const file = await host.open(path, { write: true, lock: 'write' })
  try {
    const isBlockDevice = (await host.status(path))?.kind === 'block'
    return await repairFile(file, what, isBlockDevice, options)
  } finally {
    await file.close()
  }
}

async function repairFile(
  file: HostFile,
  what: RepairKind,
  isBlockDevice: boolean,
  options: CheckOptions,
): Promise<RepairResult> {
  const mended = what === 'all' ? await repairHeader(file, isBlockDevice) : []
  const old = await openSubject(file)
  const { findings: before } = await findAll(old, options)
  const found = [...mended, ...before.problems]
  const wasDirty = isDirty(old.header)
  if (what === 'leaks') await repairLeaks(old, before, isBlockDevice)
  let after = await checkAgain(file, options)
  // What one round puts right may let the next see more.
  let isChanging = what === 'all' && (found.length > 0 || wasDirty)
  for (let round = 0; round < ROUNDS_MAX && isChanging; round++) {
    await repairAll(await openSubject(file), isBlockDevice)
    const previous = after
    after = await checkAgain(file, options)
    isChanging = wrong(after) > 0 && wrong(after) !== wrong(previous)
  }
  const subject = await openSubject(file)
  if (subject.header.version === 3) await setMarks(subject, { isClean: wrong(after) === 0, wasDirty })
  await file.sync()
  const foundErrors = before.corruptions + before.checkErrors + mended.length
  return {
    ...after,
    corruptionsFixed: Math.max(0, foundErrors - after.corruptions - after.checkErrors),
    leaksFixed: Math.max(0, before.leaks - after.leaks),
    found,
  }
}

async function checkAgain(file: HostFile, options: CheckOptions): Promise<CheckResult> {
  return checkImage(await openSubject(file), options)
}

function wrong({ corruptions, leaks, checkErrors }: CheckResult): number {
  return corruptions + leaks + checkErrors
}

async function openSubject(file: HostFile): Promise<Subject> {
  const header = parseHeader(await readFirstCluster(file), file.size(), file.path)
  const l1 = new Uint8Array(header.l1Size * spec.ENTRY_SIZE)
  await file.read(header.l1Offset, l1.length, l1, 0)
  return { file, header, l1 }
}

/** Mends what would keep the image from being opened; durable on return. */
async function repairHeader(file: HostFile, isBlockDevice: boolean): Promise<string[]> {
  const first = await readFirstCluster(file)
  const end = roundUp(file.size(), first.length)
  const done = mendHeader(first, file.size(), isBlockDevice ? undefined : end)
  if (done.length === 0) return done
  // What cannot be mended fails here, before anything is written.
  parseHeader(first, end + first.length, file.path)
  if (!isBlockDevice) await file.write(end, first.length, new Uint8Array(first.length), 0)
  await file.sync()
  await file.write(0, first.length, first, 0)
  await file.sync()
  return done
}

/** Lowers counts that are too high, unless other clusters' counts or unreadable tables say that more is wrong. */
async function repairLeaks(subject: Subject, findings: Findings, isBlockDevice: boolean): Promise<void> {
  if (findings.leaks === 0 || findings.hidden > 0) return
  const mayFlag = findings.corruptions === findings.flags && findings.checkErrors === 0
  await repairRefcounts(subject, { mayRaise: false, mayLower: true, mayFlag, isBlockDevice })
}

/** Repairs everything but the header's place. */
async function repairAll(subject: Subject, isBlockDevice: boolean): Promise<void> {
  const { file, header } = subject
  if (header.version === 3 && !isDirty(header)) {
    header.incompatible |= spec.INCOMPAT_DIRTY
    await writeFeatures(file, header)
  }
  const left = await mendEntries(subject, isBlockDevice)
  await file.sync()
  const count = left.overhang ?? header.snapshotCount
  const mayMove = !isBlockDevice || count === 0
  if (mayMove && (left.isMisshapen || left.overhang !== undefined)) await rewriteSnapshots(file, header, count)
  if (left.areBitmapsBroken) {
    const first = await readFirstCluster(file)
    dropBitmaps(first)
    await file.write(0, first.length, first, 0)
    await file.sync()
  }
  const mended = await openSubject(file)
  await repairRefcounts(mended, { mayRaise: true, mayLower: left.hidden === 0, mayFlag: true, isBlockDevice })
}

/** What the walk over all entries leaves to be done. */
interface Left {
  /** Tables that cannot be followed. */
  readonly hidden: number
  /** How many snapshots fit the table, when not all do. */
  readonly overhang: number | undefined
  readonly isMisshapen: boolean
  readonly areBitmapsBroken: boolean
}

async function mendEntries(subject: Subject, isBlockDevice: boolean): Promise<Left> {
  const { file, header, l1 } = subject
  let hidden = 0
  let overhang: number | undefined
  let isMisshapen = false
  let areBitmapsBroken = false
  let end = 0
  const farthest = file.size() + QCOW2_REPAIR_REACH
  const entry = new Uint8Array(header.l2EntrySize)
  const roots = { file, header, l1, refcountBlocks: [] }
  const clashes = await findClashes(roots, clustersOf(subject))
  await walkReferences(roots, {
    area(offset, length) {
      end = Math.max(end, offset + length)
    },
    async flaw(flaw, place, times) {
      if (HIDING.has(flaw)) hidden += times
      const isL1 = flaw.startsWith('L1')
      const length = isL1 ? spec.ENTRY_SIZE : header.l2EntrySize
      await file.read(place, length, entry, 0)
      const reach = reachOf(entry, isL1, header)
      if (clashes.mayWrite(place) && MENDS[flaw]?.(entry, header) === true) await file.write(place, length, entry, 0)
      else if (LOST.has(flaw) && reach <= farthest) end = Math.max(end, reach)
    },
    invalid(flaw, index, _what, reach = 0) {
      if (flaw === 'snapshot' && reach <= farthest) end = Math.max(end, reach)
      if (flaw === 'bitmap') areBitmapsBroken = true
      else if (flaw === 'snapshot table end') overhang = index
      else if (flaw === 'snapshot extra data') isMisshapen = true
      else hidden++
    },
  })
  // The file holds what its end cuts whole from now on, so that nothing new, such as refcounts, is put there.
  if (!isBlockDevice && end > file.size()) await file.truncate(roundUp(end, header.clusterSize))
  return { hidden, overhang, isMisshapen, areBitmapsBroken }
}

/** Flaws of entries that go on leading past the end when they cannot be mended. */
const LOST: ReadonlySet<EntryFlaw> = new Set<EntryFlaw>(['L1 past end', 'past end', 'compressed past end'])

/** The end of what an entry leads to, in bytes of the file. */
function reachOf(entry: Uint8Array, isL1: boolean, { clusterBits, clusterSize }: Header): number {
  const high = getUint32(entry, 0)
  const low = getUint32(entry, 4)
  return isL1 || (high & spec.OFLAG_COMPRESSED_HIGH) === 0
    ? spec.entryOffset(high, low) + clusterSize
    : spec.compressedOffset(high, low, clusterBits) + spec.compressedLength(high, low, clusterBits)
}

/** Mends the bytes of an entry; false when that cannot be done without guessing. */
type Mend = (entry: Uint8Array, header: Header) => boolean

const clearAll: Mend = (entry) => {
  entry.fill(0)
  return true
}

const clearCopied: Mend = (entry) => {
  entry[0] = (entry[0] as number) & 0x7f
  return true
}

/** Makes the entry read as zeros. Version 2 cannot say that; without a backing file an empty entry does. */
const readAsZeros: Mend = (entry, header) => {
  if (header.version === 2 && header.backing !== undefined) return false
  if (header.version === 2) entry.fill(0)
  else loseThePlace(entry, header.extendedL2)
  return true
}

/** Clears reserved bits, given as a mask for each half of the entry. */
const clearBits =
  (maskHigh: number, maskLow: (header: Header) => number): Mend =>
  (entry, header) => {
    setUint32(entry, 0, (getUint32(entry, 0) & ~maskHigh) >>> 0)
    setUint32(entry, 4, (getUint32(entry, 4) & ~maskLow(header)) >>> 0)
    return true
  }

const MENDS: Readonly<Partial<Record<EntryFlaw, Mend>>> = {
  'L1 reserved': clearBits(spec.L1_RESERVED_HIGH, () => spec.L1_RESERVED_LOW),
  'L1 nowhere': clearAll,
  'L1 past end': clearAll,
  reserved: clearBits(spec.L2_RESERVED_HIGH, (header) =>
    header.extendedL2 ? spec.EXTENDED_L2_RESERVED_LOW : spec.L2_RESERVED_LOW,
  ),
  nowhere: clearCopied,
  'unaligned zeros': readAsZeros,
  'past end': readAsZeros,
  'compressed copied': clearCopied,
}

async function setMarks({ file, header }: Subject, state: { isClean: boolean; wasDirty: boolean }): Promise<void> {
  const marks = spec.INCOMPAT_DIRTY | spec.INCOMPAT_CORRUPT
  const wanted = state.isClean
    ? header.incompatible & ~marks
    : (header.incompatible & ~spec.INCOMPAT_DIRTY) | (state.wasDirty ? spec.INCOMPAT_DIRTY : 0)
  if (wanted === header.incompatible) return
  await file.sync()
  header.incompatible = wanted
  await writeFeatures(file, header)
}
