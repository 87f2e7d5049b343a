// Views on whole engines on a simulated host: what a reader sees stays as it was at the moment while the guest writes, and the bits of
// a bitmap are dropped only when the reader says that it has all of it; any other end, a crash among them, brings them back.

import assert from 'node:assert/strict'
import { type TestContext, test } from 'node:test'
import { Random, seedOfRun } from '../../src/base/random.ts'
import type { BlockDevice } from '../../src/block/device.ts'
import { isBlockError } from '../../src/block/error.ts'
import type { ViewRequest } from '../../src/engine/views.ts'
import type { Keep } from '../../src/host/simulated.ts'
import type { JobStatus } from '../../src/job/job.ts'
import { Lab, LAB_REPOSITORY, readWhole } from '../support/lab.ts'

const GRANULE = 4096
const SIZE = 64 * GRANULE + 1536

class Trial {
  readonly random: Random
  lab: Lab
  content = new Map<string, Buffer>()

  constructor(lab: Lab, random: Random) {
    this.lab = lab
    this.random = random
  }

  async disk(name: string, format: 'raw' | 'qcow2'): Promise<void> {
    await this.lab.engine.createDisk(name, `/images/${name}.${format}`, format, SIZE)
    this.content.set(name, Buffer.alloc(SIZE))
  }

  async write(name = 'vm', count = 1): Promise<void> {
    const { random } = this
    const content = this.content.get(name) as Buffer
    for (let i = 0; i < count; i++) {
      const first = random.below(SIZE / 512)
      const length = Math.min(1 + random.below(20), SIZE / 512 - first) * 512
      const data = random.fill(Buffer.alloc(length))
      await this.lab.guest(name).write(first * 512, length, data, 0, 0)
      content.set(data, first * 512)
    }
  }

  async open(request: Partial<ViewRequest> = {}): Promise<string> {
    return (await this.lab.engine.openView({ disks: ['vm'], ...request })).id
  }

  /** What a client does that follows the map: the old copy, with what the map says has changed read from the view. */
  async follow(view: string, before: Buffer, name = 'vm'): Promise<Buffer> {
    const device = this.lab.view(`${name}@${view}`)
    assert.ok(device !== undefined)
    const changed = this.lab.viewServing(`${name}@${view}`)?.changed
    if (changed === undefined) return readWhole(device)
    const copy = Buffer.from(before)
    const runs: [number, number][] = []
    changed.bits.runs(0, SIZE, SIZE, (offset, length) => runs.push([offset, length]) > 0)
    for (const [offset, length] of runs) await device.read(offset, length, copy, offset)
    return copy
  }

  async end(view: string, verb: 'finalize' | 'cancel'): Promise<JobStatus> {
    await this.lab.engine.sayToJob(view, verb)
    return this.lab.engine.jobEnded(view)
  }

  dirtyBytes(bitmap: string): number | undefined {
    return this.lab.engine.showDisk('vm').bitmaps.find(({ name }) => name === bitmap)?.dirtyBytes
  }
}

async function start(t: TestContext): Promise<Trial> {
  const random = new Random(seedOfRun())
  t.diagnostic(`VARVE_SEED=${random.seed}`)
  const trial = new Trial(await Lab.create(), random)
  await trial.disk('vm', random.chance(0.5) ? 'raw' : 'qcow2')
  await trial.write('vm', 10)
  return trial
}

test('a chain of incremental views copies the disk exactly, through aborts, crashes, edits and writes meanwhile', async (t) => {
  const trial = await start(t)
  const { random } = trial
  await trial.lab.engine.editBitmaps('vm', [{ edit: 'add', name: 'b', granule: GRANULE << random.below(3) }])
  let copy: Buffer = Buffer.from(trial.content.get('vm') as Buffer)
  for (let round = 0; round < 40; round++) {
    await trial.write('vm', random.below(6))
    const moment = Buffer.from(trial.content.get('vm') as Buffer)
    const view = await trial.open({ bitmap: 'b', whole: random.chance(0.3), acknowledge: random.chance(0.3) })
    await trial.write('vm', random.below(6))
    const read = await trial.follow(view, copy)
    assert.ok(read.equals(moment), `round ${round}: the copy is the moment`)
    await trial.write('vm', random.below(3))
    const fate = random.pick(['finalize', 'finalize', 'cancel', 'kill', 'power', 'stop'] as const)
    if (fate === 'finalize') {
      assert.equal((await trial.end(view, 'finalize')).error, undefined)
      copy = read
    } else if (fate === 'cancel') {
      assert.equal((await trial.end(view, 'cancel')).error?.kind, 'cancelled')
    } else {
      if (fate === 'stop') await trial.lab.stop()
      else trial.lab = trial.lab.fork(fate === 'kill' ? undefined : random.pick<Keep>(['all', 'none', random]))
      await trial.lab.start()
      const ended = await trial.lab.engine.jobEnded(view)
      assert.match(ended.error?.message ?? '', /has ended and its bits are back/)
      trial.content.set('vm', await readWhole(trial.lab.guest('vm')))
    }
    assert.deepEqual(
      trial.lab.engine.showDisk('vm').bitmaps.map(({ name, recording }) => [name, recording]),
      [['b', true]],
    )
  }
  await trial.lab.stop()
})

test('a crash at any moment of a completion leaves the bits dropped or back, of all disks alike, and the next view copies exactly', async (t) => {
  const trial = await start(t)
  await trial.disk('other', 'qcow2')
  const names = ['vm', 'other']
  for (const name of names) await trial.lab.engine.editBitmaps(name, [{ edit: 'add', name: 'b' }])
  const before = new Map(names.map((name) => [name, Buffer.from(trial.content.get(name) as Buffer)]))
  for (const name of names) await trial.write(name, 5)
  const view = await trial.open({ disks: names, bitmap: 'b' })
  const read = new Map<string, Buffer>()
  for (const name of names) read.set(name, await trial.follow(view, before.get(name) as Buffer, name))
  // Of the first nothing is written any more: no mark of a whole region hides a bit that is missing after a power loss.
  await trial.write('other', 3)
  const forks: Lab[] = []
  const snap = (): void => {
    for (const keep of ['none', trial.random, 'all', undefined] as const) forks.push(trial.lab.fork(keep))
  }
  const { catalog } = trial.lab
  const commit = catalog.commit.bind(catalog)
  catalog.commit = async (changes) => {
    snap()
    await commit(changes)
    snap()
  }
  await trial.end(view, 'finalize')
  snap()
  const kept = new Set<boolean>()
  for (const lab of forks) {
    await lab.start()
    const now = new Map<string, Buffer>()
    for (const name of names) now.set(name, await readWhole(lab.guest(name)))
    await lab.engine.jobEnded(view)
    const again = new Trial(lab, trial.random)
    for (const name of names) assert.deepEqual([...lab.disk(name).log.bitmaps.keys()], ['b'])
    const second = await lab.engine.openView({ disks: names, bitmap: 'b' })
    const status = lab.engine.listJobs().find(({ id }) => id === view)
    const isDone = status?.error === undefined
    kept.add(isDone)
    for (const name of names) {
      const copy = await again.follow(second.id, (isDone ? read : before).get(name) as Buffer, name)
      assert.ok(
        copy.equals(now.get(name) as Buffer),
        `${name} is copied exactly, ${isDone ? 'after' : 'without'} the first`,
      )
    }
    await lab.stop()
  }
  assert.equal(kept.size, 2, 'crashes hit before and after')
})

test('a view without a bitmap is a full that changes no bitmap, and one since a bitmap leaves that as it is', async (t) => {
  const trial = await start(t)
  const moment = Buffer.from(trial.content.get('vm') as Buffer)
  const full = await trial.open()
  await trial.write('vm', 4)
  assert.ok((await trial.follow(full, Buffer.alloc(SIZE))).equals(moment))
  assert.deepEqual(trial.lab.engine.showDisk('vm').bitmaps, [])
  await trial.end(full, 'finalize')
  await trial.lab.engine.editBitmaps('vm', [{ edit: 'add', name: 'b' }])
  const base = Buffer.from(trial.content.get('vm') as Buffer)
  await trial.write('vm', 4)
  const dirty = trial.dirtyBytes('b')
  for (let i = 0; i < 2; i++) {
    const view = await trial.open({ since: 'b' })
    assert.ok((await trial.follow(view, base)).equals(trial.content.get('vm') as Buffer))
    await trial.end(view, 'finalize')
    assert.equal(trial.dirtyBytes('b'), dirty)
  }
  const first = await trial.open({ bitmap: 'new' })
  assert.equal(trial.lab.viewServing(`vm@${first}`)?.changed, undefined, 'a bitmap that was not there: all is shown')
  await trial.end(first, 'cancel')
  assert.equal(trial.dirtyBytes('new'), undefined)
  await trial.end(await trial.open({ bitmap: 'new' }), 'finalize')
  assert.equal(trial.dirtyBytes('new'), 0)
  await trial.lab.stop()
})

test('what was not asked for or was acknowledged cannot be read; nothing can be written; a part of a granule is not acknowledged', async (t) => {
  const trial = await start(t)
  await trial.lab.engine.editBitmaps('vm', [{ edit: 'add', name: 'b' }])
  await trial.lab.guest('vm').write(GRANULE, GRANULE, Buffer.alloc(GRANULE, 9), 0, 0)
  const into = Buffer.alloc(GRANULE)
  const view = await trial.open({ bitmap: 'b', acknowledge: true })
  const device = trial.lab.view(`vm@${view}`)
  assert.ok(device !== undefined)
  await device.read(GRANULE, GRANULE, into, 0)
  await device.trim(GRANULE, 512, 0)
  await device.read(GRANULE, GRANULE, into, 0)
  await device.trim(GRANULE, GRANULE, 0)
  await assert.rejects(async () => device.read(GRANULE, GRANULE, into, 0), /already released/)
  await assert.rejects(async () => device.read(0, 512, into, 0), /not part of this backup/)
  assert.throws(
    () => device.write(0, 512, into, 0, 0),
    (error) => isBlockError(error, 'read-only'),
  )
  await trial.end(view, 'cancel')
  await trial.lab.stop()
})

test('a second view, a disk that grows or reverts meanwhile, and bad requests are refused', async (t) => {
  const trial = await start(t)
  const { engine } = trial.lab
  await engine.createSnapshot('vm', 's')
  const view = await trial.open()
  const refused = async (work: Promise<unknown>, kind: string, message: RegExp): Promise<void> =>
    assert.rejects(work, (error) => isBlockError(error) && error.kind === kind && message.test(error.message))
  await refused(trial.open(), 'busy', new RegExp(`has a view already: varve job finalize ${view}`))
  await refused(engine.resizeDisk('vm', 2 * SIZE), 'busy', /resize has to wait/)
  await refused(engine.revert('vm', 's'), 'busy', /revert has to wait/)
  await refused(engine.removeDisk('vm'), 'busy', /in use by job view-/)
  await trial.end(view, 'cancel')
  await refused(trial.open({ bitmap: 'a', since: 'b' }), 'invalid-argument', /not both/)
  await refused(trial.open({ since: 'b' }), 'not-found', /no bitmap b/)
  await refused(trial.open({ bitmap: 'backup:x' }), 'invalid-argument', /Varve's own/)
  await refused(trial.open({ leaseMs: 0 }), 'invalid-argument', /a lease of 0 ms/)
  await refused(trial.open({ disks: ['vm', 'vm'] }), 'invalid-argument', /each disk once/)
  await refused(trial.open({ disks: ['none'] }), 'not-found', /no disk none/)
  await trial.lab.stop()
})

test('a view ends when nobody reads it for its lease, counted from when the last reader left', async (t) => {
  const trial = await start(t)
  await trial.lab.engine.editBitmaps('vm', [{ edit: 'add', name: 'b' }])
  await trial.write('vm', 3)
  const dirty = trial.dirtyBytes('b')
  const view = await trial.open({ bitmap: 'b', leaseMs: 30 })
  const ended = await trial.lab.engine.jobEnded(view)
  assert.match(ended.error?.message ?? '', /nobody read the view for 30 ms/)
  assert.equal(trial.dirtyBytes('b'), dirty)
  // A reader that is there keeps it however short the lease is.
  const read = await trial.open({ bitmap: 'b', leaseMs: 1000 })
  const serving = trial.lab.viewServing(`vm@${read}`)
  serving?.opened()
  serving?.opened()
  serving?.closed()
  assert.equal(trial.lab.engine.showJob(read).state, 'pending')
  serving?.closed()
  assert.match((await trial.lab.engine.jobEnded(read)).error?.message ?? '', /nobody read the view/)
  assert.equal(trial.lab.view(`vm@${read}`), undefined)
  await trial.lab.stop()
})

test('when scratch is used up the view ends and the guest goes on', async (t) => {
  const random = new Random(seedOfRun())
  t.diagnostic(`VARVE_SEED=${random.seed}`)
  const lab = await Lab.create(undefined, { scratchBytes: 4 * GRANULE })
  const trial = new Trial(lab, random)
  await trial.disk('vm', 'raw')
  const all = random.fill(Buffer.alloc(SIZE))
  await lab.guest('vm').write(0, SIZE, all, 0, 0)
  const view = await trial.open({ bitmap: 'b' })
  await lab.guest('vm').write(0, SIZE, Buffer.alloc(SIZE, 1), 0, 0)
  const ended = await lab.engine.jobEnded(view)
  assert.equal(ended.error?.kind, 'no-space')
  assert.equal(trial.dirtyBytes('b'), undefined)
  assert.ok((await readWhole(lab.guest('vm'))).equals(Buffer.alloc(SIZE, 1)))
  await trial.end(await trial.open({ bitmap: 'b' }), 'finalize')
  await lab.stop()
})

test('a view and a backup of one disk take their moments at the same time', async (t) => {
  const trial = await start(t)
  const { engine } = trial.lab
  await engine.editBitmaps('vm', [{ edit: 'add', name: 'b' }])
  const moment = Buffer.from(trial.content.get('vm') as Buffer)
  const [view, backup] = await Promise.all([
    engine.openView({ disks: ['vm'], bitmap: 'b', whole: true }),
    engine.backup({ disks: ['vm'], repository: LAB_REPOSITORY, full: false, speed: 0 }),
  ])
  await trial.write('vm', 5)
  assert.equal((await engine.jobEnded(backup.id)).error, undefined)
  assert.ok((await readWhole(trial.lab.view(`vm@${view.id}`) as BlockDevice)).equals(moment))
  assert.equal((await trial.end(view.id, 'finalize')).error, undefined)
  await trial.lab.stop()
})
