// How much scratch a machine's next backup will take, learned from the ones before: how fast its guests change what they have not
// changed yet, and how fast that is copied. What is to copy grows with the time since the last backup; while it is copied, guests
// change some of it first, and that is what scratch holds. A forecast only decides who waits: the budget itself is kept by scratch.
//
//   to do = write rate x time since the last moment        (of a full: all that was copied then)
//   scratch = least of: to do, write rate x time that copying it takes

import type { ForecastRecord } from './catalog.ts'

/** A backup that was made. */
export interface BackupFigures {
  /** Its moment, in milliseconds since 1970, and how long copying took. */
  readonly momentMs: number
  readonly tookMs: number
  /** Bytes that were copied, and those of them that guests changed before. */
  readonly copiedBytes: number
  readonly savedBytes: number
  readonly full: boolean
}

/** How much a new figure counts; a higher one counts whole. */
const WEIGHT = 0.5

/** What is known after a backup, from what was known before. Rates are in bytes per second. */
export function learn(id: string, before: ForecastRecord | undefined, figures: BackupFigures): ForecastRecord {
  const { momentMs, tookMs, copiedBytes, savedBytes, full } = figures
  const saveRate = rate(savedBytes, tookMs)
  const changeRate =
    full || before === undefined ? saveRate : Math.max(saveRate, rate(copiedBytes, momentMs - before.momentMs))
  const copyRate = rate(copiedBytes, tookMs)
  return {
    id,
    momentMs,
    writeRate: before === undefined ? changeRate : Math.max(changeRate, mean(before.writeRate, changeRate)),
    // Slow copies take scratch for longer: the slower one counts whole.
    copyRate: before === undefined ? copyRate : Math.min(copyRate, mean(before.copyRate, copyRate)),
    fullBytes: full ? copiedBytes : (before?.fullBytes ?? copiedBytes),
  }
}

/** Bytes that scratch will hold at most, when it begins at a moment; 0 for a machine that is not known. */
export function expectedScratch(known: ForecastRecord | undefined, atMs: number, full: boolean): number {
  if (known === undefined || known.copyRate === 0) return 0
  const sinceMs = Math.max(0, atMs - known.momentMs)
  const todo = full ? known.fullBytes : Math.min(known.fullBytes, (known.writeRate * sinceMs) / 1000)
  return Math.ceil(Math.min(todo, (known.writeRate * todo) / known.copyRate))
}

function rate(bytes: number, ms: number): number {
  return Math.round((bytes / Math.max(1, ms)) * 1000)
}

function mean(before: number, now: number): number {
  return Math.round(before + (now - before) * WEIGHT)
}
