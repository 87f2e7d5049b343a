// Repairs the refcounts of a qcow2 image from what refers to each cluster: in place where the refcount structure is sound, else
// by a new one at the end of the file, which the header is led to when it is whole.
//
//   | ... what the file has | new refcount table | a new refcount block for every part of the file |

import { Breather } from '../../base/breather.ts'
import { setUint32, setUint64 } from '../../base/bytes.ts'
import { QCOW2_REFCOUNT_TABLE_MAX } from '../../base/limits.ts'
import { divideUp } from '../../base/round.ts'
import { BlockError } from '../../block/error.ts'
import { clustersOf, nextPage, type Subject, windowsOf } from './check.ts'
import { Clashes, countWindow } from './clashes.ts'
import { setCopiedFlags } from './copied-flags.ts'
import { setCount } from './refcounts.ts'
import type { Roots } from './references.ts'
import * as spec from './spec.ts'
import { StoredCounts } from './stored-counts.ts'
import type { Tally } from './tally.ts'

/** What may be changed. */
export interface RefcountRepair {
  /** Raise counts that are too low, and replace a structure that is not sound. */
  readonly mayRaise: boolean
  /** Lower counts that are too high. Not while something that cannot be read may use the clusters. */
  readonly mayLower: boolean
  /** Set the copied flags by the counts. */
  readonly mayFlag: boolean
  /** The image is a host block device: it has no end to grow. */
  readonly isBlockDevice: boolean
}

/** Repairs the counts. Kind 'no-space' when there is no room for a new structure. A sync must follow. */
export async function repairRefcounts(subject: Subject, what: RefcountRepair): Promise<void> {
  const stored = new StoredCounts(subject.file, subject.header)
  await stored.open()
  const isSound = await fixInPlace(subject, stored, what)
  if (!isSound && what.mayRaise) await rebuild(subject, stored, what)
}

function rootsOf({ file, header, l1 }: Subject, refcountBlocks: Iterable<number>): Roots {
  return { file, header, l1, refcountBlocks }
}

/** Sets what may be set where it is. False when the structure is not sound, and nothing was set. */
async function fixInPlace(subject: Subject, stored: StoredCounts, what: RefcountRepair): Promise<boolean> {
  const roots = rootsOf(subject, stored.blocks)
  // A crash may leave counts past the end of the file, which would be leaks as soon as it grows.
  const windows = [...windowsOf(Math.max(clustersOf(subject), stored.end))]
  let isSound = stored.flaws.size === 0
  const clashes = new Clashes(subject.header.clusterSize)
  let seen: Tally | undefined
  for (const { start, stop } of windows) {
    seen = await countWindow(roots, start, stop)
    clashes.collect(seen)
    isSound &&= isStructureSound(subject, stored, seen)
  }
  if (!isSound) return false
  for (const { start, stop } of windows) {
    // The counts of an image that fits one window are still there.
    const tally = windows.length === 1 && seen !== undefined ? seen : await countWindow(roots, start, stop)
    await setCounts(stored, tally, what)
    if (what.mayFlag) await setCopiedFlags(roots, tally, clashes)
  }
  return true
}

/** True when table and blocks are used for nothing else, and every cluster in use has a block. */
function isStructureSound({ header }: Subject, stored: StoredCounts, tally: Tally): boolean {
  const { clusterSize, refcountTableOffset, refcountTableClusters } = header
  const isAlone = (cluster: number): boolean => !tally.has(cluster) || tally.count(cluster) === 1
  for (let i = 0; i < refcountTableClusters; i++) if (!isAlone(refcountTableOffset / clusterSize + i)) return false
  for (const block of stored.blocks) if (!isAlone(block / clusterSize)) return false
  for (let first = tally.start; first < tally.end; first = nextPage(stored, first)) {
    const stop = Math.min(tally.end, nextPage(stored, first))
    if (stored.hasBlock(first) || tally.isSurelyEmpty(first, stop)) continue
    for (let cluster = first; cluster < stop; cluster++) if (tally.count(cluster) !== 0) return false
  }
  return true
}

async function setCounts(stored: StoredCounts, tally: Tally, what: RefcountRepair): Promise<void> {
  const breather = new Breather()
  for (let first = tally.start; first < tally.end; first = nextPage(stored, first)) {
    if (!stored.hasBlock(first)) continue
    await stored.load(first)
    const stop = Math.min(tally.end, nextPage(stored, first))
    let isChanged = false
    for (let cluster = first; cluster < stop; cluster++) {
      const old = stored.get(cluster)
      const used = Math.min(tally.count(cluster), stored.largest)
      if (used > old ? !what.mayRaise : !what.mayLower || used === old) continue
      stored.set(cluster, used)
      isChanged = true
    }
    if (isChanged) await stored.write()
    await breather.pause()
  }
}

/** Where a new structure goes, in clusters. */
interface Plan {
  readonly start: number
  readonly tableClusters: number
  readonly blocks: number
}

/** Writes a new refcount structure, and leads the header to it. Durable on return. */
async function rebuild(subject: Subject, stored: StoredCounts, what: RefcountRepair): Promise<void> {
  const { file, header } = subject
  // The old structure is given up: what it took is free, unless something else uses it.
  const withoutOld: Subject = { ...subject, header: { ...header, refcountTableClusters: 0 } }
  const roots = rootsOf(withoutOld, [])
  const plan = await planStructure(subject, roots, stored.perBlock, what.isBlockDevice)
  const end = plan.start + plan.tableClusters + plan.blocks
  const block = new Uint8Array(header.clusterSize)
  const bits = 2 ** header.refcountOrder
  const clashes = await findClashes(roots, plan.start)
  for (const { start, stop } of windowsOf(end)) {
    const tally = await countWindow(roots, start, stop)
    if (what.mayFlag) await setCopiedFlags(roots, tally, clashes)
    tally.add(plan.start * header.clusterSize, (end - plan.start) * header.clusterSize, 'unique', 1)
    for (let first = start; first < stop; first += stored.perBlock) {
      block.fill(0)
      for (let cluster = first; cluster < Math.min(stop, first + stored.perBlock); cluster++) {
        const old = what.mayLower ? 0 : await oldCount(stored, cluster)
        setCount(block, cluster - first, bits, Math.max(old, Math.min(tally.count(cluster), stored.largest)))
      }
      const place = plan.start + plan.tableClusters + first / stored.perBlock
      await file.write(place * header.clusterSize, block.length, block, 0)
    }
  }
  await leadTo(subject, plan)
}

/** The clashes among the first `clusters` clusters. */
export async function findClashes(roots: Roots, clusters: number): Promise<Clashes> {
  const clashes = new Clashes(roots.header.clusterSize)
  for (const { start, stop } of windowsOf(clusters)) clashes.collect(await countWindow(roots, start, stop))
  return clashes
}

/** What the old structure, where it can be read, says of a cluster that perhaps something hidden uses. */
async function oldCount(stored: StoredCounts, cluster: number): Promise<number> {
  if (stored.isFlawed(cluster)) return 0
  await stored.load(cluster)
  return stored.get(cluster)
}

async function planStructure(
  { file, header }: Subject,
  roots: Roots,
  perBlock: number,
  isBlockDevice: boolean,
): Promise<Plan> {
  const fileClusters = clustersOf({ file, header })
  let start = fileClusters
  if (isBlockDevice) {
    start = 1
    for (const window of windowsOf(fileClusters))
      start = Math.max(start, (await countWindow(roots, window.start, window.stop)).lastUsed + 1)
  }
  let blocks = 1
  let tableClusters = 1
  const total = (): number => start + tableClusters + blocks
  while (blocks * perBlock < total()) {
    blocks = divideUp(total(), perBlock)
    tableClusters = divideUp(blocks * spec.ENTRY_SIZE, header.clusterSize)
  }
  const isTooLong = tableClusters * header.clusterSize > Math.max(QCOW2_REFCOUNT_TABLE_MAX, header.clusterSize)
  if (isTooLong || (isBlockDevice && total() > fileClusters)) {
    const message = `${file.path} has no room for new refcounts: ${tableClusters + blocks} clusters at its end`
    throw new BlockError('no-space', message, { path: file.path })
  }
  return { start, tableClusters, blocks }
}

async function leadTo({ file, header }: Subject, { start, tableClusters, blocks }: Plan): Promise<void> {
  const table = new Uint8Array(tableClusters * header.clusterSize)
  for (let i = 0; i < blocks; i++)
    setUint64(table, i * spec.ENTRY_SIZE, (start + tableClusters + i) * header.clusterSize)
  await file.write(start * header.clusterSize, table.length, table, 0)
  await file.sync()
  const fields = new Uint8Array(12)
  setUint64(fields, 0, start * header.clusterSize)
  setUint32(fields, 8, tableClusters)
  await file.write(spec.HEADER.refcount_table_offset, fields.length, fields, 0)
  await file.sync()
  header.refcountTableOffset = start * header.clusterSize
  header.refcountTableClusters = tableClusters
}
