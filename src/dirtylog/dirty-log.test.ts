import assert from 'node:assert/strict'
import { test } from 'node:test'
import { DIRTYLOG_FOLD_MS, DIRTYLOG_REGION } from '../base/limits.ts'
import { Random } from '../base/random.ts'
import { Bitmap } from '../bitmap/bitmap.ts'
import { isBlockError } from '../block/error.ts'
import { type HostOperation, SimulatedHost } from '../host/simulated.ts'
import { DirtyLog, type DirtyLogFiles, type DirtyLogOptions } from './dirty-log.ts'
import { RECORD_BYTES } from './spec.ts'

const MIB = 1024 * 1024
const SIZE = 64 * MIB + 100
const GRANULE = 4096

async function openFiles(host: SimulatedHost): Promise<DirtyLogFiles> {
  const [a, b, c, d] = await Promise.all(
    ['area0', 'area1', 'slot0', 'slot1'].map((name) => host.open(`/${name}`, { write: true, create: 'if-missing' })),
  )
  assert.ok(a !== undefined && b !== undefined && c !== undefined && d !== undefined)
  return { areas: [a, b], slots: [c, d] }
}

interface World {
  readonly host: SimulatedHost
  readonly log: DirtyLog
  readonly seen: HostOperation[]
}

/** A log with the recording bitmap "all"; `seen` collects the operations of the host from now on. */
async function start(options: Partial<DirtyLogOptions> & { areaBytes?: number } = {}): Promise<World> {
  const host = new SimulatedHost()
  const files = await openFiles(host)
  await host.syncFolder('/')
  const log = await DirtyLog.create(files, {
    bootId: host.bootId(),
    size: SIZE,
    areaBytes: 64 * RECORD_BYTES,
    ...options,
  })
  await log.edit([{ kind: 'add', name: 'all', recording: true, fill: 'none' }])
  const seen: HostOperation[] = []
  host.beforeOperation = (operation) => seen.push(operation)
  return { host, log, seen }
}

async function reopen(host: SimulatedHost): ReturnType<typeof DirtyLog.open> {
  host.beforeOperation = undefined
  return DirtyLog.open(await openFiles(host), { bootId: host.bootId() })
}

const count = (log: DirtyLog, name: string): number | undefined => log.bitmaps.get(name)?.bits.count
const kinds = (seen: HostOperation[]): string => seen.map(({ kind, path }) => `${kind} ${path}`).join(', ')

test('the first mark of a region waits for one synced record, later ones write a record, and a repeated one does nothing', async () => {
  const { log, seen } = await start()
  const first = log.mark(0, GRANULE)
  const second = log.mark(DIRTYLOG_REGION, GRANULE)
  assert.ok(first !== undefined && second !== undefined)
  assert.ok(log.mark(0, GRANULE) !== undefined, 'a repeated mark waits for the sync that is under way')
  await Promise.all([first, second])
  assert.equal(kinds(seen), 'write /area0, write /area0, sync /area0')
  seen.length = 0
  assert.equal(log.mark(GRANULE, GRANULE), undefined)
  assert.equal(kinds(seen), 'write /area0')
  seen.length = 0
  assert.equal(log.mark(0, 2 * GRANULE), undefined)
  assert.deepEqual(seen, [])
})

test('without recording bitmaps a mark does nothing', async () => {
  const { log, seen } = await start()
  await log.edit([{ kind: 'record', name: 'all', on: false }])
  seen.length = 0
  assert.equal(log.mark(0, SIZE), undefined)
  assert.deepEqual(seen, [])
  assert.equal(count(log, 'all'), 0)
})

test('an edit holds within the call, is all or nothing, and keeps the objects of its bitmaps', async () => {
  const { log } = await start()
  const all = log.bitmaps.get('all')
  await log.mark(0, 3 * GRANULE)
  const todo = new Bitmap(SIZE)
  todo.set(8 * MIB, GRANULE)
  const edited = log.edit([
    { kind: 'add', name: 'todo', recording: false, fill: todo, meta: '{}' },
    { kind: 'merge', from: 'all', into: 'todo' },
    { kind: 'clear', name: 'all' },
    { kind: 'rename', name: 'all', to: 'since' },
    { kind: 'add', name: 'coarse', granule: 65_536, recording: true, fill: 'all' },
  ])
  assert.equal(log.bitmaps.get('since'), all)
  assert.deepEqual([count(log, 'todo'), count(log, 'since'), count(log, 'coarse')], [4, 0, 1025])
  await edited
  const bad = [
    [
      { kind: 'remove', name: 'todo' },
      { kind: 'remove', name: 'todo' },
    ],
    [
      { kind: 'remove', name: 'todo' },
      { kind: 'rename', name: 'since', to: 'coarse' },
    ],
    [
      { kind: 'remove', name: 'todo' },
      { kind: 'meta', name: 'since', meta: 'x'.repeat(5000) },
    ],
    [
      { kind: 'remove', name: 'todo' },
      { kind: 'add', name: '', recording: true, fill: 'none' },
    ],
    [
      { kind: 'remove', name: 'todo' },
      { kind: 'add', name: 'x', recording: true, fill: new Bitmap(MIB) },
    ],
  ] as const
  const errors = ['not-found', 'exists', 'invalid-argument', 'invalid-argument', 'invalid-argument']
  for (const [i, changes] of bad.entries()) await assert.rejects(log.edit(changes), { kind: errors[i] })
  assert.deepEqual([...log.bitmaps.keys()].sort(), ['coarse', 'since', 'todo'])
})

test('a clean close leaves its stamp, which the first mark after the next open takes back before it is done', async () => {
  const { host, log } = await start()
  await log.mark(0, GRANULE)
  await log.close('left well')
  assert.throws(() => log.mark(0, GRANULE), { kind: 'closed' })
  const second = await reopen(host)
  assert.deepEqual([second.recovery, second.stamp, count(second.log, 'all')], ['clean', 'left well', 1])
  await second.log.abandon()
  host.crash('none')
  const third = await reopen(host)
  assert.deepEqual([third.recovery, third.stamp], ['clean', 'left well'])
  // The granule is set already: but for the stamp nothing would be logged.
  await third.log.mark(0, GRANULE)
  host.crash('none')
  const fourth = await reopen(host)
  assert.deepEqual([fourth.recovery, fourth.stamp], ['host', undefined])
})

test('growing sets what is added in every bitmap, durably', async () => {
  const { host, log } = await start()
  await log.resize(SIZE + MIB)
  assert.equal(log.size, SIZE + MIB)
  assert.equal(log.bitmaps.get('all')?.bits.bytes, MIB + 100)
  await log.mark(SIZE + MIB - 1, 1)
  host.killProcess()
  const { log: again } = await reopen(host)
  assert.equal(again.size, SIZE + MIB)
  assert.equal(again.bitmaps.get('all')?.bits.bytes, MIB + 100)
})

test('a fold runs by itself when the area is nearly full and when the time is up, and marks wait for it when it is full', async () => {
  let fire: (() => void) | undefined
  let delay = 0
  const { log, seen } = await start({
    timer: (delayMs, run) => {
      delay = delayMs
      fire = run
      return () => (fire = undefined)
    },
  })
  await log.mark(0, GRANULE)
  assert.equal(delay, DIRTYLOG_FOLD_MS)
  fire?.()
  await log.mark(GRANULE, GRANULE)
  assert.ok(kinds(seen).includes('sync /slot1'), kinds(seen))
  await log.fold()
  seen.length = 0
  const pending = Array.from({ length: 200 }, (_, i) => log.mark((2 + i) * GRANULE, GRANULE))
  assert.ok(pending.at(-1) !== undefined)
  await Promise.all(pending)
  assert.equal(count(log, 'all'), 202)
  assert.ok(seen.filter(({ kind, path }) => kind === 'sync' && path.startsWith('/slot')).length >= 3)
  assert.ok(log.bitmaps.get('all')?.state === 'valid')
})

test('both slots damaged is one clear error that says what to do', async () => {
  const { host, log } = await start()
  await log.abandon()
  for (const name of ['/slot0', '/slot1']) {
    const file = await host.open(name, { write: true })
    await file.write(40, 1, Buffer.of(0xff), 0)
  }
  await assert.rejects(
    reopen(host),
    (error: Error) => isBlockError(error, 'corrupt') && /create its dirty log anew/.test(error.message),
  )
})

test('the older slot serves when the newer is damaged, but not when the log has gone on beyond what it covers', async () => {
  for (const goesOn of [false, true]) {
    const { host, log } = await start()
    await log.mark(0, GRANULE)
    await log.fold()
    await log.mark(20 * MIB, GRANULE)
    // Epoch 3 is in slot 1 now. With slot 0 broken, epoch 4 begins, but its slot does not replace that of epoch 2.
    host.beforeOperation = ({ kind, path }) => {
      if (kind === 'write' && path === '/slot0') throw new Error('injected')
    }
    if (goesOn) {
      await assert.rejects(log.fold(), /injected/)
      await log.mark(40 * MIB, GRANULE)
    }
    host.killProcess()
    const newer = await host.open('/slot1', { write: true })
    await newer.write(40, 1, Buffer.of(0xff), 0)
    if (goesOn) await assert.rejects(reopen(host), { kind: 'corrupt' })
    else assert.equal(count((await reopen(host)).log, 'all'), 2)
  }
})

test('a log whose record cannot be written voids the bitmaps durably, aloud, and lets the guest go on', async () => {
  for (const broken of ['write', 'sync'] as const) {
    const { host, log } = await start()
    host.beforeOperation = ({ kind, path }) => {
      if (kind === broken && path.startsWith('/area')) throw new Error('injected')
    }
    await log.mark(0, GRANULE)
    assert.equal(log.health.state, 'voided')
    assert.equal(log.bitmaps.get('all')?.state, 'void')
    assert.equal(log.mark(MIB, GRANULE), undefined)
    host.crash('none')
    const { log: again } = await reopen(host)
    assert.equal(again.bitmaps.get('all')?.state, 'void')
    assert.equal(count(again, 'all'), again.bitmaps.get('all')?.bits.length)
    await again.edit([{ kind: 'clear', name: 'all' }])
    assert.deepEqual([again.bitmaps.get('all')?.state, count(again, 'all')], ['valid', 0])
  }
})

test('when not even that can be written, marks fail until a fold succeeds in voiding the bitmaps', async () => {
  const { host, log } = await start()
  host.beforeOperation = ({ kind }) => {
    if (kind === 'write') throw new Error('injected')
  }
  await assert.rejects(async () => log.mark(0, GRANULE), { kind: 'io' })
  assert.equal(log.health.state, 'failed')
  assert.throws(() => log.mark(0, GRANULE), { kind: 'io' })
  await assert.rejects(log.edit([{ kind: 'clear', name: 'all' }]), { kind: 'io' })
  host.beforeOperation = undefined
  await log.fold()
  assert.deepEqual([log.health.state, log.bitmaps.get('all')?.state], ['voided', 'void'])
  assert.equal(log.mark(0, GRANULE), undefined)
})

test('a fold that fails is late, loses nothing, and is made good by the next', async () => {
  const { host, log } = await start()
  await log.mark(0, GRANULE)
  host.beforeOperation = ({ kind, path }) => {
    if (kind === 'sync' && path.startsWith('/slot')) throw new Error('injected')
  }
  await assert.rejects(log.fold(), /injected/)
  assert.equal(log.health.state, 'late')
  await log.mark(MIB, GRANULE)
  host.beforeOperation = undefined
  await log.fold()
  assert.equal(log.health.state, 'good')
  host.crash('none')
  const { log: again, recovery } = await reopen(host)
  assert.deepEqual([recovery, again.bitmaps.get('all')?.state], ['host', 'valid'])
  assert.ok(again.bitmaps.get('all')?.bits.has(0) && again.bitmaps.get('all')?.bits.has(256))
})

test('whichever operation of the host fails, and however often, a mark that went well is never missing afterwards', async () => {
  let tried = 0
  for (let failAt = 1; failAt < 60; failAt++) {
    for (const times of [1, 2, 5, 1000]) {
      const { host, log } = await start({ areaBytes: 16 * RECORD_BYTES })
      let operation = 0
      host.beforeOperation = () => {
        operation++
        if (operation >= failAt && operation < failAt + times) throw new Error('injected')
      }
      const marked: number[] = []
      for (let i = 0; i < 30; i++) {
        const offset = (i * 3 * MIB) % (60 * MIB)
        const done = await Promise.resolve()
          .then(() => log.mark(offset, GRANULE))
          .then(
            () => true,
            () => false,
          )
        if (done) marked.push(offset)
        if (i % 10 === 9) await log.edit([{ kind: 'meta', name: 'all', meta: String(i) }]).catch(() => undefined)
      }
      if (operation < failAt) break
      tried++
      host.crash('none')
      const found = await reopen(host).then(
        ({ log: again }) => again,
        (error: unknown) => assert.ok(isBlockError(error, 'corrupt')),
      )
      for (const offset of marked)
        assert.ok(found === undefined || found.bitmaps.get('all')?.bits.has(offset / GRANULE), `${failAt} ${times}`)
    }
  }
  assert.ok(tried > 100, `${tried}`)
})

test('a clear that waits for an edit leaves what was marked meanwhile', async () => {
  const { log } = await start()
  await log.mark(0, 2 * GRANULE)
  const edited = log.edit([{ kind: 'meta', name: 'all', meta: 'x' }])
  const cleared = [log.clear('all', 0, GRANULE), log.clear('all', GRANULE, GRANULE)]
  await log.mark(0, GRANULE)
  await Promise.all([edited, ...cleared])
  const bits = log.bitmaps.get('all')?.bits
  assert.deepEqual([bits?.has(0), bits?.has(1)], [true, false])
})

test('marks on both sides of the beginning of an epoch wait for their own records', async () => {
  const { host, log } = await start()
  host.beforeOperation = ({ path }) => {
    if (path.startsWith('/slot')) throw new Error('injected')
  }
  const before = log.mark(0, GRANULE)
  const folded = log.fold()
  const again = log.mark(0, GRANULE)
  const after = log.mark(8 * MIB, GRANULE)
  assert.ok(again !== undefined, 'the sync of the epoch before is still under way')
  await assert.rejects(folded, /injected/)
  await Promise.all([before, again, after])
  host.crash('none')
  const bits = (await reopen(host)).log.bitmaps.get('all')?.bits
  assert.deepEqual([bits?.has(0), bits?.has(2048)], [true, true])
})

test('a mark whose granules another mark is writing to the log waits for that', async () => {
  let met = 0
  for (let seed = 0; seed < 20; seed++) {
    const host = new SimulatedHost({ scheduler: new Random(seed) })
    const log = await DirtyLog.create(await openFiles(host), { bootId: host.bootId(), size: SIZE, areaBytes: 2048 })
    await log.edit([{ kind: 'add', name: 'all', recording: true, fill: 'none' }])
    await log.mark(0, GRANULE)
    if (log.mark(GRANULE, GRANULE) === undefined) continue
    met++
    assert.ok(log.mark(GRANULE, GRANULE) !== undefined)
  }
  assert.ok(met > 3, `${met}`)
})

test('an edit puts other bits in place of those that a fold may be writing', async () => {
  const { log } = await start()
  await log.edit([{ kind: 'add', name: 'full', recording: false, fill: 'all' }])
  const [all, full] = [log.bitmaps.get('all')?.bits, log.bitmaps.get('full')?.bits]
  await log.edit([
    { kind: 'merge', from: 'full', into: 'all' },
    { kind: 'clear', name: 'full' },
    { kind: 'record', name: 'full', on: true },
  ])
  await log.mark(0, GRANULE)
  assert.deepEqual([all?.count, full?.count], [0, full?.length])
  assert.deepEqual([count(log, 'all'), count(log, 'full')], [full?.length, 1])
})

test('records made before a fold was tried again do not undo the edit that it brings', async () => {
  const { host, log } = await start()
  await log.edit([{ kind: 'add', name: 'old', recording: false, fill: 'all' }])
  await log.mark(0, GRANULE)
  host.beforeOperation = ({ path }) => {
    if (path.startsWith('/slot')) throw new Error('injected')
  }
  await assert.rejects(log.fold(), /injected/)
  await log.clear('all', 0, GRANULE)
  host.beforeOperation = undefined
  await log.edit([{ kind: 'merge', from: 'old', into: 'all' }])
  host.killProcess()
  const { log: again } = await reopen(host)
  assert.equal(count(again, 'all'), again.bitmaps.get('all')?.bits.length)
})

test('what is subtracted stays away after a kill, and what is marked since stays', async () => {
  const { host, log } = await start()
  await log.mark(0, 3 * GRANULE)
  const done = new Bitmap(SIZE)
  done.set(0, 2 * GRANULE)
  const subtracted = log.edit([{ kind: 'subtract', name: 'all', bits: done }])
  assert.equal(count(log, 'all'), 1)
  await log.mark(0, GRANULE)
  await subtracted
  host.killProcess()
  const { log: again } = await reopen(host)
  const bits = again.bitmaps.get('all')?.bits
  assert.deepEqual([bits?.hasAny(0, 1), bits?.hasAny(GRANULE, 1), bits?.hasAny(2 * GRANULE, 1)], [true, false, true])
})

test('a region that was written lately is hot after a fold, by one sync for all of them; after the next it is cold', async () => {
  const { log, seen } = await start()
  await Promise.all([log.mark(0, GRANULE), log.mark(DIRTYLOG_REGION, GRANULE), log.mark(5 * DIRTYLOG_REGION, GRANULE)])
  seen.length = 0
  await log.fold()
  const ofArea = seen.filter(({ path }) => path === '/area1')
  assert.equal(kinds(ofArea), 'write /area1, write /area1, sync /area1')
  assert.equal(log.mark(GRANULE, GRANULE), undefined)
  assert.equal(log.mark(5 * DIRTYLOG_REGION + GRANULE, GRANULE), undefined)
  assert.ok(log.mark(3 * DIRTYLOG_REGION, GRANULE) !== undefined, 'never written before')
  await log.fold()
  assert.ok(log.mark(DIRTYLOG_REGION + GRANULE, GRANULE) !== undefined, 'not written since the fold before')
})

test('what is hot for having been written lately counts as changed after a power loss, and not after a kill', async () => {
  const { host, log } = await start()
  await log.mark(0, GRANULE)
  await log.edit([{ kind: 'clear', name: 'all' }])
  assert.equal(log.mark(DIRTYLOG_REGION - GRANULE, GRANULE), undefined)
  await new Promise((resolve) => setImmediate(resolve))
  const killed = host.clone()
  assert.equal(count((await reopen(killed)).log, 'all'), 1)
  const lost = host.clone()
  lost.crash('none')
  assert.equal(count((await reopen(lost)).log, 'all'), DIRTYLOG_REGION / GRANULE)
})

test('a region that was written before any bitmap recorded is hot when the first one does', async () => {
  const { log } = await start()
  await log.edit([{ kind: 'remove', name: 'all' }])
  await log.mark(2 * DIRTYLOG_REGION, GRANULE)
  await log.edit([{ kind: 'add', name: 'first', recording: true, fill: 'none' }])
  assert.equal(log.mark(2 * DIRTYLOG_REGION, GRANULE), undefined)
  assert.ok(log.mark(3 * DIRTYLOG_REGION, GRANULE) !== undefined, 'never written before')
  assert.equal(count(log, 'first'), 2)
})

test('without a bitmap that is to outlive the host nothing is made hot', async () => {
  const { log, seen } = await start()
  await log.mark(0, GRANULE)
  seen.length = 0
  await log.edit([{ kind: 'record', name: 'all', on: false }])
  assert.deepEqual(
    seen.filter(({ path }) => path.startsWith('/area')),
    [],
  )
})
