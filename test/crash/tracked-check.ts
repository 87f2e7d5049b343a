// Whether the bitmaps that an opened disk has after a crash are what was known of them just before (tracked-bitmaps.ts): after a kill exactly
// that, after a power loss with nothing missing, and with too much only in regions that were written since the last fold but three.

import assert from 'node:assert/strict'
import { DIRTYLOG_REGION } from '../../src/base/limits.ts'
import type { LoggedBitmap } from '../../src/dirtylog/dirty-log.ts'
import type { Loss } from './engine-life.ts'
import { type Bits, type Known, type ModelBitmap, VIEW_BITMAP, type World } from './tracked-bitmaps.ts'
import { BLOCK } from './versioned-guest.ts'

type Logged = ReadonlyMap<string, LoggedBitmap>

/** Where a bit may be that is not known to be. */
interface Slack {
  /** After a power loss these. */
  readonly regions: ReadonlySet<number> | undefined
  /** What a bitmap has outlived. */
  readonly outlived: 'process' | 'host'
  /** Blocks whose last request, which was not acknowledged, took effect: their bits must be there where they may be. */
  readonly took: ReadonlySet<number>
}

/** Fails when one of them is not as it may be; returns how many were looked at. */
export function checkTracked(
  known: Known,
  logged: Logged,
  loss: Loss,
  took: ReadonlySet<number>,
  note: string,
): number {
  const isKill = loss === 'kill'
  const slack = { regions: isKill ? undefined : known.regions, outlived: isKill ? 'process' : 'host', took } as const
  const users = new Map([...logged].filter(([name]) => !name.includes(':') && name !== VIEW_BITMAP))
  fits(
    known.worlds.map((world) => wrongInWorld(world, users, slack)),
    note,
  )
  const viewed = logged.get(VIEW_BITMAP)
  assert.ok(viewed?.recording === true, `${note}: there is no bitmap ${VIEW_BITMAP} that records`)
  fits(
    known.viewed.map((bits) => wrongIn(VIEW_BITMAP, bits, viewed, slack)),
    note,
  )
  return users.size + 1 + checkBackups(known, logged, slack, note)
}

/** Of those that count from a backup which was reported done: where one went on after the crash, nobody knows its moment. */
function checkBackups({ backups }: Known, logged: Logged, slack: Slack, note: string): number {
  let count = 0
  for (const [name, { since }] of backups) {
    const found = logged.get(name)
    if (found === undefined) {
      assert.equal(since.size, 0, `${note}: bitmap ${name} is gone`)
      continue
    }
    const { last } = JSON.parse(found.meta) as { readonly last?: string }
    const bits = last === undefined ? undefined : since.get(last)
    count++
    if (bits !== undefined) fits([wrongIn(name, bits, found, slack)], note)
  }
  return count
}

/** Fails unless one of several is undefined: nothing wrong. */
function fits(wrong: readonly (string | undefined)[], note: string): void {
  assert.ok(wrong.includes(undefined), `${note}: ${wrong.join('; or ')}`)
}

function wrongInWorld(world: World, logged: Logged, slack: Slack): string | undefined {
  const names = [...world.keys()].sort().join(', ')
  const found = [...logged.keys()].sort().join(', ')
  if (names !== found) return `there are the bitmaps ${found} in place of ${names}`
  for (const [name, bitmap] of world) {
    const one = logged.get(name) as LoggedBitmap
    if (one.recording !== bitmap.recording) return `bitmap ${name}: recording is ${one.recording}`
    if (one.bits.granule !== bitmap.granule) return `bitmap ${name}: its granule is ${one.bits.granule}`
    const isVoid = bitmap.recording && !outlives(bitmap, slack)
    if (isVoid && one.state !== 'void') return `bitmap ${name} should be void`
    const wrong = isVoid
      ? undefined
      : wrongIn(name, bitmap, one, bitmap.recording ? slack : { ...slack, took: new Set() })
    if (wrong !== undefined) return wrong
  }
  return undefined
}

function outlives({ durability }: ModelBitmap, { outlived }: Slack): boolean {
  return durability === 'host' || (durability === 'process' && outlived === 'process')
}

function wrongIn(name: string, bits: Bits, logged: LoggedBitmap, slack: Slack): string | undefined {
  if (logged.state !== 'valid') return `bitmap ${name} is ${logged.state}`
  const { must, may } = bits
  const blocks = logged.bits.granule / BLOCK
  for (let block = 0; block < must.length; block++) {
    const isDue = must[block] === 1 || (may[block] === 1 && slack.took.has(block))
    if (isDue && !logged.bits.has(Math.floor(block / blocks))) return `bitmap ${name} lacks block ${block}`
  }
  return tooMuchIn(name, bits, logged, slack)
}

function tooMuchIn(name: string, { may }: Bits, { bits }: LoggedBitmap, { regions }: Slack): string | undefined {
  const blocks = bits.granule / BLOCK
  for (let block = 0; block < may.length; block += blocks) {
    const granule = Math.floor(block / blocks)
    if (!bits.has(granule) || may.subarray(block, block + blocks).includes(1)) continue
    if (regions?.has(Math.floor((block * BLOCK) / DIRTYLOG_REGION)) !== true)
      return `bitmap ${name} has granule ${granule} for no reason`
  }
  return undefined
}
