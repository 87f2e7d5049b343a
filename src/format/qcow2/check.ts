// Counts what refers to each cluster of a qcow2 image and compares it with the refcounts: to report (`checkImage`), or to
// rebuild the refcounts of an image that was not closed cleanly (`repairRefcounts`). Large images are counted in windows, one
// walk over all tables for each, so that memory stays bounded.

import { Breather } from '../../base/breather.ts'
import { getUint32, setUint32 } from '../../base/bytes.ts'
import { QCOW2_CHECK_WINDOW } from '../../base/limits.ts'
import { divideUp, roundUp } from '../../base/round.ts'
import type { Pending } from '../../block/device.ts'
import { BlockError } from '../../block/error.ts'
import type { HostFile } from '../../host/host.ts'
import type { Allocator } from './allocator.ts'
import type { Header } from './header.ts'
import { type ActiveEntry, type AreaKind, type Roots, walkReferences } from './references.ts'
import { Refcounts } from './refcounts.ts'
import * as spec from './spec.ts'
import type { Tables } from './tables.ts'

export interface CheckResult {
  /** Places that are wrong and may lose data: doubly used, wrongly flagged or counted too low, or leading nowhere. */
  readonly corruptions: number
  /** Clusters that are counted and that nothing uses: space lost, no more. */
  readonly leaks: number
  /** Clusters of the disk's size, those with data of their own, and the compressed ones among them. */
  readonly totalClusters: number
  readonly allocatedClusters: number
  readonly compressedClusters: number
  /** End of the last cluster in use, in bytes of the file. */
  readonly imageEndOffset: number
  /** The first few findings, a sentence each. */
  readonly problems: readonly string[]
}

const PROBLEMS_MAX = 20

/** Bits of `kinds`: what a cluster is used as. */
const KIND_BIT: Readonly<Record<AreaKind, number>> = { unique: 1, 'L2 table': 2, data: 4, compressed: 8 }
const CLASH = 16

/** Collects findings; all are counted, a few kept. */
class Findings {
  corruptions = 0
  leaks = 0
  readonly problems: string[] = []

  corruption(what: string): void {
    this.corruptions++
    if (this.problems.length < PROBLEMS_MAX) this.problems.push(what)
  }

  leak(cluster: number): void {
    this.leaks++
    if (this.problems.length < PROBLEMS_MAX) this.problems.push(`cluster ${cluster} is counted and not used`)
  }
}

/** What refers to the clusters `start` to `end` - 1. */
class Window {
  readonly start: number
  readonly end: number
  /** The last cluster with a reference; -1 for none. */
  lastUsed = -1
  readonly #counts: Uint16Array
  readonly #kinds: Uint8Array
  readonly #clusterSize: number

  constructor(start: number, end: number, clusterSize: number) {
    this.start = start
    this.end = end
    this.#counts = new Uint16Array(end - start)
    this.#kinds = new Uint8Array(end - start)
    this.#clusterSize = clusterSize
  }

  add(offset: number, length: number, kind: AreaKind): void {
    const first = Math.max(this.start, Math.floor(offset / this.#clusterSize))
    const end = Math.min(this.end, divideUp(offset + length, this.#clusterSize))
    const bit = KIND_BIT[kind]
    for (let cluster = first; cluster < end; cluster++) {
      const index = cluster - this.start
      const before = this.#kinds[index] as number
      const isClash = (before & ~bit) !== 0 || (before !== 0 && kind === 'unique')
      this.#kinds[index] = before | bit | (isClash ? CLASH : 0)
      if (this.count(cluster) < 0xffff) this.#counts[index] = this.count(cluster) + 1
    }
    if (first < end) this.lastUsed = Math.max(this.lastUsed, end - 1)
  }

  has(cluster: number): boolean {
    return cluster >= this.start && cluster < this.end
  }

  count(cluster: number): number {
    return this.#counts[cluster - this.start] ?? 0
  }

  isClash(cluster: number): boolean {
    return ((this.#kinds[cluster - this.start] ?? 0) & CLASH) !== 0
  }
}

/** What is checked. */
interface Subject {
  readonly file: HostFile
  readonly header: Header
  readonly tables: Tables
  readonly refcounts: Refcounts
}

/** Checks the image; `live` are its refcounts in memory when it is being written. */
export async function checkImage(
  file: HostFile,
  header: Header,
  tables: Tables,
  live: Refcounts | undefined,
): Promise<CheckResult> {
  const findings = new Findings()
  const refcounts = live ?? new Refcounts(file, header)
  const wrong = live === undefined ? await refcounts.openLeniently() : []
  if (!tables.mayPassEnd) for (const index of wrong) findings.corruption(`refcount table entry ${index} cannot be`)
  const subject: Subject = { file, header, tables, refcounts }
  let lastUsed = -1
  for (const window of windowsOf(subject)) {
    await countReferences(subject, window, window.start === 0 ? findings : undefined)
    await visitWrongFlags(subject, window, ({ place }) => {
      findings.corruption(`the copied flag of the entry at ${place} is wrong`)
      return undefined
    })
    await compare(refcounts, window, (cluster, stored, counted) => {
      if (stored > counted) findings.leak(cluster)
      else findings.corruption(`cluster ${cluster} is used ${counted} times and counted ${stored} times`)
    })
    reportClashes(window, findings)
    lastUsed = Math.max(lastUsed, window.lastUsed)
  }
  const { corruptions, leaks, problems } = findings
  const imageEndOffset = (lastUsed + 1) * header.clusterSize
  return { corruptions, leaks, problems, imageEndOffset, ...(await countGuest(subject)) }
}

/**
 * Makes the refcounts of a dirty image what its tables say. Refcounts and allocator are to be opened after. Writes; nothing is in flight. Kind
 * 'corrupt', with the refcounts as they were, when the tables are wrong in a way that no crash of a careful writer explains.
 */
export async function repairRefcounts(
  file: HostFile,
  header: Header,
  tables: Tables,
  allocator: Allocator,
): Promise<void> {
  const { refcounts } = allocator
  const subject: Subject = { file, header, tables, refcounts }
  await refcounts.clearEntries(await refcounts.openLeniently())
  await allocator.open(divideUp(await dropLost(subject), header.clusterSize))
  await addBlocks(allocator)
  // First look, then write: an image that cannot be repaired stays as it is.
  let seen: Window | undefined
  for (const window of windowsOf(subject)) {
    await countForRepair(subject, window)
    seen = window
  }
  for (const window of windowsOf(subject)) {
    // The counts of an image that fits one window are still there.
    const isSeen = seen?.start === window.start && seen.end === window.end
    if (!isSeen) await countForRepair(subject, window)
    await rebuild(subject, isSeen ? (seen as Window) : window)
  }
  await refcounts.writeBack()
  await file.sync()
  await tables.open()
  tables.forget()
}

async function countForRepair(subject: Subject, window: Window): Promise<void> {
  const findings = new Findings()
  await countReferences(subject, window, findings)
  reportClashes(window, findings)
  if (findings.corruptions === 0) return
  const { path } = subject.file
  const more = findings.corruptions - 1
  const message = `${path} is corrupt: ${findings.problems[0]}, and ${more} more; run qemu-img check -r all`
  throw new BlockError('corrupt', message, { path })
}

/** Windows over every cluster that is in the file or has a count. */
function* windowsOf({ file, header, refcounts }: Subject): Generator<Window> {
  const { table, perBlock } = refcounts
  const fileClusters = divideUp(file.size(), header.clusterSize)
  const end = Math.max(fileClusters, (table.findLastIndex((place) => place !== 0) + 1) * perBlock)
  for (let start = 0; start < end; start += QCOW2_CHECK_WINDOW) {
    const stop = Math.min(end, start + QCOW2_CHECK_WINDOW)
    const hasBlock = table.subarray(Math.floor(start / perBlock), divideUp(stop, perBlock)).some((place) => place !== 0)
    if (start < fileClusters || hasBlock) yield new Window(start, stop, header.clusterSize)
  }
}

function rootsOf({ file, header, tables, refcounts }: Subject): Roots {
  return { file, header, l1: tables.l1, refcountTable: refcounts.table }
}

async function countReferences(subject: Subject, window: Window, findings: Findings | undefined): Promise<void> {
  const { file, header, tables } = subject
  const fileEnd = roundUp(file.size(), header.clusterSize)
  await walkReferences(rootsOf(subject), {
    area(offset, length, kind) {
      window.add(offset, length, kind)
      const isCut = kind === 'compressed' ? offset >= fileEnd : offset + length > fileEnd
      if (isCut && !tables.mayPassEnd) findings?.corruption(`${kind} at ${offset} lies after the end of the file`)
    },
    invalid: (what) => findings?.corruption(what),
  })
}

/** Visits the entries of the active tables whose copied flag is not what the counts in the window say. */
async function visitWrongFlags(
  subject: Subject,
  window: Window,
  visit: (entry: ActiveEntry) => Pending,
): Promise<void> {
  const { clusterSize } = subject.header
  await walkReferences(rootsOf(subject), {
    area: () => undefined,
    invalid: () => undefined,
    active(entry) {
      const cluster = entry.target / clusterSize
      if (!window.has(cluster) || entry.isCopied === (window.count(cluster) === 1)) return undefined
      return visit(entry)
    },
  })
}

/** Visits the clusters of the window whose refcount is not the count. */
async function compare(
  refcounts: Refcounts,
  window: Window,
  different: (cluster: number, stored: number, counted: number) => void,
): Promise<void> {
  const breather = new Breather()
  for (let first = window.start; first < window.end; first += refcounts.perPage) {
    await refcounts.load(first)
    const end = Math.min(window.end, first + refcounts.perPage)
    for (let cluster = first; cluster < end; cluster++) {
      const stored = refcounts.get(cluster)
      const counted = window.count(cluster)
      if (stored !== counted) different(cluster, stored, counted)
    }
    await breather.pause()
  }
}

function reportClashes(window: Window, findings: Findings): void {
  for (let cluster = window.start; cluster <= window.lastUsed; cluster++) {
    if (window.isClash(cluster)) findings.corruption(`cluster ${cluster} is used for two different things`)
  }
}

/** Sets refcounts and copied flags of the window to what was counted. */
async function rebuild(subject: Subject, window: Window): Promise<void> {
  const { file, refcounts } = subject
  await compare(refcounts, window, (cluster, _stored, counted) => {
    if (counted > refcounts.largest) {
      const message = `${file.path}: cluster ${cluster} is used ${counted} times, more than its refcount can say`
      throw new BlockError('corrupt', message, { path: file.path })
    }
    refcounts.set(cluster, counted)
  })
  const byte = new Uint8Array(1)
  await visitWrongFlags(subject, window, async ({ place, isCopied }) => {
    await file.read(place, 1, byte, 0)
    byte[0] = ((byte[0] as number) & 0x7f) | (isCopied ? 0 : 0x80)
    await file.write(place, 1, byte, 0)
  })
}

/**
 * Entries may lead past the end of the file when a power loss kept them and not what they lead to. They read as zeros,
 * and become just that before anything new is put there. Gives the end of all that is referred to, in bytes of the file.
 */
async function dropLost(subject: Subject): Promise<number> {
  const { file, header, tables } = subject
  const fileSize = file.size()
  const noTable = new Uint8Array(spec.ENTRY_SIZE)
  const zeros = new Uint8Array(header.l2EntrySize)
  if (header.extendedL2) setUint32(zeros, spec.SUBCLUSTERS_ZERO, 0xffff_ffff)
  else zeros[7] = spec.OFLAG_ZERO_LOW
  let isChanged = false
  let end = 0
  await walkReferences(rootsOf(subject), {
    area(offset, length) {
      if (offset < fileSize) end = Math.max(end, offset + length)
    },
    invalid: () => undefined,
    active({ place, isL1, target }) {
      if (target < fileSize) return undefined
      isChanged = true
      return isL1 ? file.write(place, noTable.length, noTable, 0) : file.write(place, zeros.length, zeros, 0)
    },
  })
  if (isChanged) await file.sync()
  await tables.open()
  tables.forget()
  tables.mayPassEnd = false
  return end
}

/** Gives every refcount block that the file needs a place, without counting: that comes after. */
async function addBlocks(allocator: Allocator): Promise<void> {
  const { refcounts } = allocator
  for (let index = 0; index * refcounts.perBlock < allocator.end; index++) {
    if (index >= refcounts.table.length) await allocator.growTable()
    if (refcounts.table[index] === 0) await allocator.addBlock(index)
  }
}

/** Counts the disk's own clusters, in the active tables. */
async function countGuest({
  file,
  header,
  tables,
}: Subject): Promise<Pick<CheckResult, 'totalClusters' | 'allocatedClusters' | 'compressedClusters'>> {
  const perTable = header.clusterSize / header.l2EntrySize
  const totalClusters = divideUp(header.size, header.clusterSize)
  const l2 = new Uint8Array(header.clusterSize)
  let allocatedClusters = 0
  let compressedClusters = 0
  for (let l1Index = 0; l1Index * perTable < totalClusters; l1Index++) {
    const table = tables.tableAt(l1Index)
    if (table === 0 || table % header.clusterSize !== 0 || table >= file.size()) continue
    await file.read(table, l2.length, l2, 0)
    const end = Math.min(perTable, totalClusters - l1Index * perTable) * header.l2EntrySize
    for (let at = 0; at < end; at += header.l2EntrySize) {
      const high = getUint32(l2, at)
      const isCompressed = (high & spec.OFLAG_COMPRESSED_HIGH) !== 0
      if (isCompressed) compressedClusters++
      if (isCompressed || spec.entryOffset(high, getUint32(l2, at + 4)) !== 0) allocatedClusters++
    }
  }
  return { totalClusters, allocatedClusters, compressedClusters }
}
