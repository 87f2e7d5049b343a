import assert from 'node:assert/strict'
import { test } from 'node:test'
import { DIRTYLOG_REGION } from '../base/limits.ts'
import { SimulatedHost } from '../host/simulated.ts'
import { DirtyLog, type DirtyLogFiles, type LoggedBitmap, type Recovery } from './dirty-log.ts'
import { DURABILITIES, type Durability } from './durability.ts'
import { RECORD_BYTES } from './spec.ts'

const SIZE = 4 * DIRTYLOG_REGION
const GRANULE = 4096

async function openFiles(host: SimulatedHost): Promise<DirtyLogFiles> {
  const open = (name: string) => host.open(`/${name}`, { write: true, create: 'if-missing' })
  return { areas: [await open('a0'), await open('a1')], slots: [await open('s0'), await open('s1')] }
}

/** A log with one recording bitmap, or one of each kind, by the name of what it outlives. */
async function start(...kinds: readonly Durability[]): Promise<{ host: SimulatedHost; log: DirtyLog; seen: string[] }> {
  const host = new SimulatedHost()
  const files = await openFiles(host)
  await host.syncFolder('/')
  const log = await DirtyLog.create(files, { bootId: host.bootId(), size: SIZE, areaBytes: 64 * RECORD_BYTES })
  await log.edit(
    kinds.map((durability) => ({ kind: 'add', name: durability, recording: true, fill: 'none', durability })),
  )
  const seen: string[] = []
  host.beforeOperation = ({ kind }) => seen.push(kind)
  return { host, log, seen }
}

async function reopen(
  host: SimulatedHost,
): Promise<{ bitmaps: ReadonlyMap<string, LoggedBitmap>; recovery: Recovery }> {
  host.beforeOperation = undefined
  const { log, recovery } = await DirtyLog.open(await openFiles(host), { bootId: host.bootId() })
  return { bitmaps: log.bitmaps, recovery }
}

/** Of each bitmap whether it is void, and how many granules it has when it is not. */
function counts(bitmaps: ReadonlyMap<string, LoggedBitmap>): Record<string, number | 'void'> {
  return Object.fromEntries(
    Array.from(bitmaps, ([name, { state, bits }]) => [name, state === 'void' ? state : bits.count]),
  )
}

test('a mark of a cold region waits for a sync, writes a record, or does nothing, by what the bitmap outlives', async () => {
  const costs = { host: ['write', 'sync'], process: ['write'], none: [] }
  for (const durability of DURABILITIES) {
    const { log, seen } = await start(durability)
    const pending = log.mark(0, GRANULE)
    assert.equal(pending === undefined, durability !== 'host', durability)
    await pending
    assert.deepEqual(seen, costs[durability], durability)
    assert.equal(log.bitmaps.get(durability)?.bits.count, 1)
  }
})

test('of several bitmaps the most demanding one that lacks the granule says what a mark costs', async () => {
  const { log, seen } = await start('none', 'process', 'host')
  await log.mark(0, GRANULE)
  assert.deepEqual(seen.splice(0), ['write', 'sync'])
  await log.edit([
    { kind: 'clear', name: 'process' },
    { kind: 'clear', name: 'none' },
  ])
  seen.length = 0
  assert.equal(log.mark(0, GRANULE), undefined, 'in a region that the edit made cold')
  assert.deepEqual(seen.splice(0), ['write'])
  await log.edit([{ kind: 'clear', name: 'none' }])
  seen.length = 0
  assert.equal(log.mark(0, GRANULE), undefined)
  assert.deepEqual(seen, [])
})

test('after a kill what outlives it is exact, and the rest is void; after a power loss the same', async () => {
  const { host, log } = await start('host', 'process', 'none')
  await log.mark(0, GRANULE)
  await log.mark(GRANULE, GRANULE)
  const killed = host.clone()
  const found = await reopen(killed)
  assert.equal(found.recovery, 'process')
  assert.deepEqual(counts(found.bitmaps), { host: 2, process: 2, none: 'void' })
  for (const keep of ['all', 'none'] as const) {
    const lost = host.clone()
    lost.crash(keep)
    const after = await reopen(lost)
    assert.equal(after.recovery, 'host')
    assert.deepEqual(
      counts(after.bitmaps),
      { host: DIRTYLOG_REGION / GRANULE, process: 'void', none: 'void' },
      'the region is set',
    )
  }
})

test('all outlive a clean close, and what does not record outlives everything', async () => {
  const { host, log } = await start(...DURABILITIES)
  await log.mark(0, GRANULE)
  await log.edit(DURABILITIES.map((name) => ({ kind: 'record', name, on: false })))
  await log.mark(GRANULE, GRANULE)
  const lost = host.clone()
  lost.crash('none')
  assert.deepEqual(counts((await reopen(lost)).bitmaps), { host: 1, process: 1, none: 1 })
  await log.edit(DURABILITIES.map((name) => ({ kind: 'record', name, on: true })))
  await log.mark(GRANULE, GRANULE)
  await log.close('stamp')
  host.crash('none')
  const { bitmaps, recovery } = await reopen(host)
  assert.equal(recovery, 'clean')
  assert.deepEqual(counts(bitmaps), { host: 2, process: 2, none: 2 })
})

test('a bitmap that a crash made void stays so until it is cleared', async () => {
  const { host, log } = await start('none')
  await log.mark(0, GRANULE)
  const first = await reopen(host)
  assert.deepEqual(counts(first.bitmaps), { none: 'void' })
  const { log: again } = await DirtyLog.open(await openFiles(host), { bootId: host.bootId() })
  assert.deepEqual(counts(again.bitmaps), { none: 'void' })
  await again.edit([{ kind: 'clear', name: 'none' }])
  assert.deepEqual(counts(again.bitmaps), { none: 0 })
  assert.equal(log.bitmaps.get('none')?.durability, 'none')
})
