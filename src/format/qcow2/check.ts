// Checks a qcow2 image: counts what refers to each cluster and compares it with the refcounts and copied flags in the file. What
// is found, and how it is counted, is what `qemu-img check` finds and counts. Changes nothing (repair.ts does). Large images
// are counted in windows, one walk over all tables for each, so that memory stays bounded.

import { Breather } from '../../base/breather.ts'
import { QCOW2_CHECK_PROBLEMS, QCOW2_CHECK_WINDOW } from '../../base/limits.ts'
import { divideUp } from '../../base/round.ts'
import { andThen } from '../../block/device.ts'
import type { HostFile } from '../../host/host.ts'
import type { Header } from './header.ts'
import { type EntryFlaw, type Roots, walkReferences } from './references.ts'
import { StoredCounts } from './stored-counts.ts'
import { Tally } from './tally.ts'

/** The fields that `qemu-img check` has, under its names. */
export interface CheckResult {
  /** What is wrong and may lose data: entries that lead nowhere, refcounts that are too low, copied flags that are wrong. */
  readonly corruptions: number
  /** Clusters that are counted more often than they are used: space lost, no more. */
  readonly leaks: number
  /** Clusters whose refcount could not even be looked up. */
  readonly checkErrors: number
  /** Clusters of the disk's size; those that the disk's tables hold; of these the ones out of order, and the compressed. */
  readonly totalClusters: number
  readonly allocatedClusters: number
  readonly fragmentedClusters: number
  readonly compressedClusters: number
  /** End of the last cluster that is used or counted, in bytes of the file. */
  readonly imageEndOffset: number
  /** The first few findings, a sentence each. */
  readonly problems: readonly string[]
}

export interface CheckOptions {
  /** Told now and then how much is done, in clusters of the file. */
  readonly progress?: (done: number, total: number) => void
  /** Clusters that are counted in one walk over the tables; as many as memory allows unless told. */
  readonly window?: number
}

/** Collects findings; all are counted, a few kept. */
export class Findings {
  corruptions = 0
  leaks = 0
  checkErrors = 0
  /** How many of the corruptions are wrong copied flags. */
  flags = 0
  /** Tables that could not be followed: what they refer to seems unused, and may be in use. */
  hidden = 0
  readonly problems: string[] = []

  corruption(what: string, times = 1): void {
    this.corruptions += times
    this.#keep(what)
  }

  leak(what: string): void {
    this.leaks++
    this.#keep(what)
  }

  error(what: string): void {
    this.checkErrors++
    this.#keep(what)
  }

  #keep(what: string): void {
    if (this.problems.length < QCOW2_CHECK_PROBLEMS) this.problems.push(what)
  }
}

/** What each flaw is, of "the entry at N". */
export const FLAWS: Readonly<Record<EntryFlaw, string>> = {
  'L1 reserved': 'of an L1 table has reserved bits set',
  'L1 nowhere': 'of an L1 table leads to the header',
  'L1 unaligned': 'of an L1 table leads to no cluster’s start',
  'L1 past end': 'of an L1 table leads past the end of the file',
  reserved: 'of an L2 table has reserved bits set',
  nowhere: 'of an L2 table is marked copied and leads nowhere',
  unaligned: 'of an L2 table leads to data at no cluster’s start',
  'unaligned past end': 'of an L2 table leads to no cluster’s start',
  'unaligned zeros': 'of an L2 table reads as zeros and keeps a place at no cluster’s start',
  'past end': 'of an L2 table leads past the end of the file',
  'compressed copied': 'of an L2 table is compressed and marked copied',
  'compressed past end': 'of an L2 table leads to compressed data past the end of the file',
  'compressed subclusters': 'of an L2 table is compressed and has subclusters',
  'compressed in data file': 'of an L2 table is compressed, though the data is in a data file',
  'subclusters both': 'of an L2 table has subclusters that are data and zeros at once',
  'subclusters nowhere': 'of an L2 table has subclusters with data and leads nowhere',
  'zeros in version 2': 'of an L2 table has the zero flag, which version 2 has not',
  'other place in data file': 'of an L2 table leads to another place in the data file than the guest’s own offset',
}

/** Flaws that hide what a table refers to. */
export const HIDING: ReadonlySet<EntryFlaw> = new Set<EntryFlaw>(['L1 unaligned', 'unaligned'])

/** An image, and what of it is in memory. */
export interface Subject {
  readonly file: HostFile
  readonly header: Header
  /** Bytes of the active L1 table. */
  readonly l1: Uint8Array
}

/** Checks the image, as its file is. Kinds: those of reading the file. */
export async function checkImage(subject: Subject, options: CheckOptions = {}): Promise<CheckResult> {
  const { findings, guest, end } = await findAll(subject, options)
  const { corruptions, leaks, checkErrors, problems } = findings
  const imageEndOffset = end * subject.header.clusterSize
  const totalClusters = divideUp(subject.header.size, subject.header.clusterSize)
  return { corruptions, leaks, checkErrors, totalClusters, ...guest, imageEndOffset, problems }
}

type Guest = Pick<CheckResult, 'allocatedClusters' | 'fragmentedClusters' | 'compressedClusters'>

/** What a check finds; `end` is the first cluster after all that are used or counted. */
export async function findAll(
  subject: Subject,
  options: CheckOptions,
): Promise<{ readonly findings: Findings; readonly guest: Guest; readonly end: number }> {
  const findings = new Findings()
  const stored = new StoredCounts(subject.file, subject.header)
  await stored.open()
  for (const [index, flaw] of stored.flaws) findings.corruption(`entry ${index} of the refcount table ${flaw}`)
  const fileClusters = clustersOf(subject)
  const clusters = fileClusters + 1
  let guest: Guest = { allocatedClusters: 0, fragmentedClusters: 0, compressedClusters: 0 }
  let end = 1
  for (const { start, stop } of windowsOf(clusters, options.window)) {
    const tally = new Tally(start, stop, subject.header.clusterSize)
    await markStoredOnes(stored, tally)
    const progress = (part: number): void => options.progress?.(start + Math.floor(part * (stop - start)), clusters)
    guest = await countAndJudge(subject, tally, stored, findings, progress)
    reportBlocks(stored, tally, subject.header.clusterSize, findings)
    end = Math.max(end, await compareCounts(stored, tally, fileClusters, findings))
    options.progress?.(stop, clusters)
  }
  return { findings, guest, end }
}

/** How many clusters the file has; the last may be cut. The one after them may be used too, by what the file's end cuts. */
export function clustersOf({ file, header }: Pick<Subject, 'file' | 'header'>): number {
  return divideUp(file.size(), header.clusterSize)
}

/** The windows in which `clusters` clusters are counted, of `window` clusters each. */
export function* windowsOf(
  clusters: number,
  window: number = QCOW2_CHECK_WINDOW,
): Generator<{ readonly start: number; readonly stop: number }> {
  for (let start = 0; start < clusters; start += window) yield { start, stop: Math.min(clusters, start + window) }
}

/** Marks what is counted once in the file, before the walk compares copied flags with it. */
async function markStoredOnes(stored: StoredCounts, tally: Tally): Promise<void> {
  const breather = new Breather()
  for (let first = tally.start; first < tally.end; first = nextPage(stored, first)) {
    if (!stored.hasBlock(first)) continue
    await stored.load(first)
    const end = Math.min(tally.end, nextPage(stored, first))
    for (let cluster = first; cluster < end; cluster++) if (stored.get(cluster) === 1) tally.markStoredOne(cluster)
    await breather.pause()
  }
}

/** The first cluster after the page of refcounts that holds the cluster's. */
export function nextPage(stored: StoredCounts, cluster: number): number {
  return cluster - (cluster % stored.perPage) + stored.perPage
}

/** Walks the image once: counts the window's references, and judges entries and copied flags. */
async function countAndJudge(
  subject: Subject,
  tally: Tally,
  stored: StoredCounts,
  findings: Findings,
  progress: (part: number) => void,
): Promise<Guest> {
  const { file, header, l1 } = subject
  const guest = { allocatedClusters: 0, fragmentedClusters: 0, compressedClusters: 0 }
  const roots: Roots = { file, header, l1, refcountBlocks: stored.blocks }
  const clusters = clustersOf(subject)
  // What concerns no single cluster is found in the first window, and not again in the others.
  const general = tally.start === 0 ? findings : new Findings()
  const wrongFlag = (place: number, times: number): undefined => {
    findings.flags += times
    findings.corruption(`the copied flag of the entry at ${place} is wrong`, times)
  }
  await walkReferences(roots, {
    area: (offset, length, kind, times) => tally.add(offset, length, kind, times),
    flaw(flaw, place, times) {
      general.corruption(`the entry at ${place} ${FLAWS[flaw]}`, times)
      if (HIDING.has(flaw)) general.hidden += times
      return undefined
    },
    invalid(flaw, _index, what) {
      general.corruption(what)
      if (flaw !== 'snapshot extra data') general.hidden++
    },
    flag(place, target, isCopied, times) {
      const cluster = Math.floor(target / header.clusterSize)
      if (tally.has(cluster)) {
        if (tally.isStoredOne(cluster) !== isCopied && !stored.isUnreadable(cluster)) wrongFlag(place, times)
        return undefined
      }
      const isElsewhere = tally.start > 0 || (cluster >= 0 && cluster < clusters)
      if (isElsewhere || (cluster < 0 && isCopied)) return undefined
      if (cluster < 0) return wrongFlag(place, times)
      return andThen(stored.load(cluster), () =>
        (stored.get(cluster) === 1) === isCopied ? undefined : wrongFlag(place, times),
      )
    },
    guest(allocated, fragmented, compressed, times) {
      guest.allocatedClusters += allocated * times
      guest.fragmentedClusters += fragmented * times
      guest.compressedClusters += compressed * times
    },
    progress,
  })
  return guest
}

/** Refcount blocks have one reference, their table entry's; the first of several entries is not to blame for the others. */
function reportBlocks({ blocks }: StoredCounts, tally: Tally, clusterSize: number, findings: Findings): void {
  const entries = new Map<number, number>()
  for (const block of blocks) entries.set(block, (entries.get(block) ?? 0) + 1)
  const seen = new Map<number, number>()
  for (const block of blocks) {
    const cluster = block / clusterSize
    if (!tally.has(cluster)) continue
    const soFar = (seen.get(block) ?? 0) + 1
    seen.set(block, soFar)
    const others = tally.count(cluster) - (entries.get(block) as number)
    if (others + soFar !== 1)
      findings.corruption(`the refcount block at ${block}, cluster ${cluster}, is used for something else too`)
  }
}

/** Compares the refcounts with the tally. Gives the cluster after the last one that is used or counted. */
async function compareCounts(
  stored: StoredCounts,
  tally: Tally,
  fileClusters: number,
  findings: Findings,
): Promise<number> {
  const breather = new Breather()
  let end = 0
  for (let first = tally.start; first < tally.end; first = nextPage(stored, first)) {
    const stop = Math.min(tally.end, nextPage(stored, first))
    if (!stored.hasBlock(first) && tally.isSurelyEmpty(first, stop)) continue
    await stored.load(first)
    const isUnreadable = stored.isUnreadable(first)
    for (let cluster = first; cluster < stop; cluster++) {
      if (cluster >= fileClusters && tally.count(cluster) === 0) break
      if (isUnreadable) {
        findings.error(`the refcount of cluster ${cluster} cannot be looked up`)
        continue
      }
      const counted = stored.get(cluster)
      const used = tally.count(cluster)
      if (counted !== 0 || used !== 0) end = cluster + 1
      if (counted === used) {
        if (tally.isClash(cluster)) findings.corruption(`cluster ${cluster} is used for two different things`)
      } else if (counted > used) findings.leak(`cluster ${cluster} is counted ${counted} times and used ${used} times`)
      else findings.corruption(`cluster ${cluster} is used ${used} times and counted ${counted} times`)
    }
    await breather.pause()
  }
  return end
}
