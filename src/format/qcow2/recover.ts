// Opening an image that was not closed cleanly: its dirty bit says that refcounts in the file may be behind, so they are made
// what the tables say, in place. What a crash of a careful writer cannot explain is refused, with the refcounts as they
// were: that is for a repair that somebody asked for (repair.ts).

import { Breather } from '../../base/breather.ts'
import { divideUp } from '../../base/round.ts'
import { BlockError } from '../../block/error.ts'
import type { HostFile } from '../../host/host.ts'
import type { Allocator } from './allocator.ts'
import { clustersOf, Findings, FLAWS, windowsOf } from './check.ts'
import { Clashes } from './clashes.ts'
import { setCopiedFlags } from './copied-flags.ts'
import type { Header } from './header.ts'
import { loseThePlace } from './mapping.ts'
import { type Roots, walkReferences } from './references.ts'
import type { Refcounts } from './refcounts.ts'
import * as spec from './spec.ts'
import type { Tables } from './tables.ts'
import { Tally } from './tally.ts'

interface Subject {
  readonly file: HostFile
  readonly header: Header
  readonly tables: Tables
  readonly refcounts: Refcounts
}

/**
 * Makes the refcounts of a dirty image what its tables say. Refcounts and allocator are to be opened after. Writes; nothing is
 * in flight. Kind 'corrupt', with the refcounts as they were, when the tables are wrong in a way that no crash of a careful
 * writer explains.
 */
export async function recoverRefcounts(
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
  const windows = [...windowsOf(Math.max(clustersOf(subject), countedEnd(refcounts)))]
  let seen: Tally | undefined
  for (const { start, stop } of windows)
    seen = await countForRepair(subject, new Tally(start, stop, header.clusterSize))
  for (const { start, stop } of windows) {
    // The counts of an image that fits one window are still there.
    const isSeen = seen?.start === start && windows.length === 1
    const tally = isSeen ? seen : await countForRepair(subject, new Tally(start, stop, header.clusterSize))
    if (tally !== undefined) await setCounts(subject, tally)
  }
  await refcounts.writeBack()
  await file.sync()
  await tables.open()
  tables.forget()
}

/** The end of what the refcount blocks cover. */
function countedEnd({ table, perBlock }: Refcounts): number {
  return (table.findLastIndex((place) => place !== 0) + 1) * perBlock
}

function rootsOf({ file, header, tables, refcounts }: Subject): Roots {
  return { file, header, l1: tables.l1, refcountBlocks: refcounts.table }
}

async function countForRepair(subject: Subject, tally: Tally): Promise<Tally> {
  const findings = new Findings()
  await walkReferences(rootsOf(subject), {
    area: (offset, length, kind, times) => tally.add(offset, length, kind, times),
    flaw(flaw, place) {
      findings.corruption(`the entry at ${place} ${FLAWS[flaw]}`)
      return undefined
    },
    invalid(flaw, _index, what) {
      if (flaw !== 'snapshot extra data') findings.corruption(what)
    },
  })
  for (let cluster = tally.start; cluster <= tally.lastUsed; cluster++)
    if (tally.isClash(cluster)) findings.corruption(`cluster ${cluster} is used for two different things`)
  if (findings.corruptions === 0) return tally
  const { path } = subject.file
  const more = findings.corruptions - 1
  const message = `${path} is corrupt: ${findings.problems[0]}, and ${more} more; repair it with: varve image check -r all ${path}`
  throw new BlockError('corrupt', message, { path })
}

/** Sets refcounts and copied flags of the window to what was counted. */
async function setCounts(subject: Subject, tally: Tally): Promise<void> {
  const { refcounts } = subject
  const breather = new Breather()
  for (let first = tally.start; first < tally.end; first += refcounts.perPage) {
    const end = Math.min(tally.end, first + refcounts.perPage)
    if (!refcounts.hasBlock(first) && tally.isSurelyEmpty(first, end)) continue
    await refcounts.withPage(first, () => {
      for (let cluster = first; cluster < end; cluster++) {
        const counted = tally.count(cluster)
        if (refcounts.get(cluster) !== counted) setCount(subject, cluster, counted)
      }
    })
    await breather.pause()
  }
  await setCopiedFlags(rootsOf(subject), tally, new Clashes(subject.header.clusterSize))
}

function setCount({ file, refcounts }: Subject, cluster: number, counted: number): void {
  if (counted > refcounts.largest) {
    const message = `${file.path}: cluster ${cluster} is used ${counted} times, more than its refcount can say`
    throw new BlockError('corrupt', message, { path: file.path })
  }
  refcounts.set(cluster, counted)
}

/**
 * Entries may lead past the end of the file when a power loss kept them and not what they lead to. They read as zeros,
 * and become just that before anything new is put there. Gives the end of all that is referred to, in bytes of the file.
 */
async function dropLost(subject: Subject): Promise<number> {
  const { file, header, tables } = subject
  const entry = new Uint8Array(header.l2EntrySize)
  let isChanged = false
  let end = 0
  await walkReferences(rootsOf(subject), {
    area(offset, length) {
      end = Math.max(end, offset + length)
    },
    async flaw(flaw, place, _times, isActive) {
      if (!isActive || (flaw !== 'past end' && flaw !== 'L1 past end')) return
      isChanged = true
      const length = flaw === 'past end' ? entry.length : spec.ENTRY_SIZE
      await file.read(place, length, entry, 0)
      if (flaw === 'past end') loseThePlace(entry, header.extendedL2)
      else entry.fill(0)
      await file.write(place, length, entry, 0)
    },
    invalid: () => undefined,
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
    if (index >= refcounts.table.length) await allocator.growTable(false)
    if (refcounts.table[index] === 0) await allocator.addBlock(index, false)
  }
}
