// Finds out, from the files alone, what the bitmaps of a disk are: the newest slot that is whole, and the records since. Writes
// nothing, so that a crash in the middle changes nothing; making the outcome durable is DirtyLog.open's.

import { DIRTYLOG_REGION } from '../base/limits.ts'
import { roundDown, roundUp } from '../base/round.ts'
import { BlockError } from '../block/error.ts'
import type { HostFile } from '../host/host.ts'
import type { Entry } from './changes.ts'
import { LogArea } from './log-area.ts'
import { readSlot, readSlotHeader, type SlotContent } from './slot.ts'
import { CLEAR, COLD_MARK, HEAT, type LogRecord } from './spec.ts'

/** The files of one log, open for writing; those of a new log are empty. */
export interface DirtyLogFiles {
  readonly areas: readonly [HostFile, HostFile]
  readonly slots: readonly [HostFile, HostFile]
}

/**
 * How the log was left. 'clean': closed, and nothing marked since. 'process': this boot of the host goes on; the bitmaps
 * are exact. 'host': the host was started anew; the bitmaps may have too much, but lack nothing.
 */
export type Recovery = 'clean' | 'process' | 'host'

export interface Recovered {
  readonly recovery: Recovery
  /** The newest slot, with the bits as they are now. */
  readonly content: SlotContent
}

/** Reads a log. Kind 'corrupt' when it is damaged: the caller creates a new one, and the bitmaps are lost. */
export async function recover(files: DirtyLogFiles, bootId: string): Promise<Recovered> {
  const content = await newestSlot(files)
  const records = await recordsSince(files, content)
  if (content.stamp !== undefined && records.length === 0) return { recovery: 'clean', content }
  for (const { record, position } of records) {
    if (record.epoch > content.epoch || position >= content.start) replay(content, record)
  }
  if (content.bootId === bootId) {
    voidUnless(content, ({ durability }) => durability !== 'none')
    return { recovery: 'process', content }
  }
  for (const { record } of records) {
    if (record.kind !== COLD_MARK && record.kind !== HEAT) continue
    const start = roundDown(record.offset, DIRTYLOG_REGION)
    markAll(content, start, roundUp(record.offset + record.length, DIRTYLOG_REGION) - start)
  }
  voidUnless(content, ({ durability }) => durability === 'host')
  return { recovery: 'host', content }
}

/** One that recorded and does not outlive what happened: what it missed is not known. */
function voidUnless({ entries }: SlotContent, survives: (entry: Entry) => boolean): void {
  for (const entry of entries) {
    if (!entry.recording || survives(entry)) continue
    entry.state = 'void'
    entry.bits.setAll()
  }
}

async function newestSlot(files: DirtyLogFiles): Promise<SlotContent> {
  const headers = await Promise.all(files.slots.map(readSlotHeader))
  const order = headers[0] !== undefined && headers[0].epoch > (headers[1]?.epoch ?? -1) ? [0, 1] : [1, 0]
  for (const index of order) {
    const header = headers[index]
    const content = header && (await readSlot(files.slots[index] as HostFile, header))
    if (content !== undefined) return content
  }
  const [one, other] = files.slots
  throw new BlockError('corrupt', `Neither ${one.path} nor ${other.path} is whole. ${ADVICE}`, { path: one.path })
}

const ADVICE = 'The bitmaps of this disk are lost: create its dirty log anew, and the next backup is a full one.'

interface Found {
  readonly record: LogRecord
  readonly position: number
}

/** The records of the slot's epoch and of the next, in the order in which they were made. */
async function recordsSince(files: DirtyLogFiles, content: SlotContent): Promise<Found[]> {
  const found: Found[] = []
  for (const epoch of [content.epoch, content.epoch + 1]) {
    const file = files.areas[epoch % 2] as HostFile
    await new LogArea(file).scan(content.epoch, (record, position) => {
      if (record.epoch === epoch) found.push({ record, position })
      else if (record.epoch > content.epoch + 1) {
        const message = `${file.path} goes on after epoch ${record.epoch}, but the newest whole slot is of ${content.epoch}`
        throw new BlockError('corrupt', `${message}. ${ADVICE}`, { path: file.path })
      }
    })
  }
  return found
}

function replay(content: SlotContent, record: LogRecord): void {
  if (record.kind === HEAT) return
  if (record.kind !== CLEAR) return markAll(content, record.offset, record.length)
  const entry = content.entries.find(({ id }) => id === record.bitmap)
  if (entry === undefined || entry.state === 'void') return
  if (record.offset < content.size) entry.bits.clear(record.offset, record.length)
}

function markAll(content: SlotContent, offset: number, length: number): void {
  // The disk may have grown by an edit that did not become durable.
  if (offset >= content.size) return
  for (const { bits, recording, state } of content.entries) {
    if (recording && state === 'valid') bits.set(offset, Math.min(length, content.size - offset))
  }
}

/** Those that a mark sets. */
export function recordingOf(entries: Iterable<Entry>): Entry[] {
  return Array.from(entries).filter(({ recording, state }) => recording && state === 'valid')
}
