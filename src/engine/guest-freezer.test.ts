import assert from 'node:assert/strict'
import path from 'node:path'
import { type TestContext, test } from 'node:test'
import { isBlockError } from '../block/error.ts'
import { FakeAgent } from '../../test/support/fake-agent.ts'
import { tempFolder } from '../../test/support/temp.ts'
import { MemoryCatalog } from './catalog.ts'
import { GuestFreezer } from './guest-freezer.ts'

const FREEZE = 'guest-fsfreeze-freeze'
const THAW = 'guest-fsfreeze-thaw'
const LONG_MS = 600_000

/** A machine with an agent, and a home that knows of it. */
class Bench {
  readonly agent: FakeAgent
  readonly catalog = new MemoryCatalog()
  readonly reports: string[] = []

  private constructor(agent: FakeAgent) {
    this.agent = agent
  }

  static async make(t: TestContext, limitMs = LONG_MS): Promise<Bench> {
    const bench = new Bench(await FakeAgent.listen(path.join(tempFolder(t), 'qga.sock')))
    t.after(() => bench.agent.close())
    const hooks = { by: { kind: 'agent', socket: bench.agent.socket }, limitMs } as const
    await bench.catalog.commit([{ put: 'machine', record: { id: 'vm1', disks: ['a'], hooks } }])
    return bench
  }

  freezer(t: TestContext, catalog = this.catalog): GuestFreezer {
    const commit = catalog.commit.bind(catalog)
    const freezer = new GuestFreezer({ catalog, commit, report: (message) => this.reports.push(message) })
    t.after(() => freezer.close())
    return freezer
  }

  get noted(): number {
    return this.catalog.list('frozen').length
  }
}

test('a guest is noted before it is frozen, until it is thawed', async (t) => {
  const bench = await Bench.make(t)
  const freezer = bench.freezer(t)
  await freezer.freeze('vm1')
  assert.deepEqual([bench.agent.isFrozen, bench.noted], [true, 1])
  // Whoever wants it frozen for another moment waits for the first.
  const second = freezer.freeze('vm1')
  assert.ok((await freezer.thaw('vm1')) !== undefined)
  await second
  assert.deepEqual([bench.agent.isFrozen, bench.noted], [true, 1])
  await freezer.thaw('vm1')
  assert.deepEqual([bench.agent.isFrozen, bench.noted], [false, 0])
  assert.deepEqual(bench.agent.asked, [FREEZE, THAW, FREEZE, THAW])
})

test('a machine without hooks is left alone', async (t) => {
  const bench = await Bench.make(t)
  await bench.catalog.commit([{ put: 'machine', record: { id: 'plain', disks: ['b'] } }])
  const freezer = bench.freezer(t)
  await freezer.freeze('plain')
  assert.equal(await freezer.thaw('plain'), 0)
  assert.deepEqual(bench.agent.asked, [])
})

test('a guest that could not be frozen is thawed all the same: it may have been', async (t) => {
  const bench = await Bench.make(t)
  bench.agent.manners[FREEZE] = 'hang up'
  await assert.rejects(bench.freezer(t).freeze('vm1'), (error) => isBlockError(error, 'io'))
  assert.deepEqual(bench.agent.asked, [FREEZE, THAW])
  assert.equal(bench.noted, 0)
})

test('a guest whose time is over is thawed without a word from whoever had it frozen, who is told', async (t) => {
  const bench = await Bench.make(t, 50)
  const freezer = bench.freezer(t)
  // On a slow machine its time may be over before it is frozen: that is told at once.
  const isFrozen = await freezer.freeze('vm1').then(
    () => true,
    (error) => !isBlockError(error, 'timeout'),
  )
  await bench.agent.heard(2)
  while (bench.noted > 0) await new Promise(setImmediate)
  if (isFrozen) assert.equal(await freezer.thaw('vm1'), undefined)
  assert.ok(!bench.agent.isFrozen)
})

test('an agent that never answers is given up after the limit, and thawed after the next start', async (t) => {
  const bench = await Bench.make(t, 20)
  bench.agent.manners[FREEZE] = 'silent'
  await assert.rejects(bench.freezer(t).freeze('vm1'), (error) => isBlockError(error, 'timeout'))
  while (bench.noted > 0) await new Promise(setImmediate)
  assert.equal(bench.agent.asked.at(-1), THAW)
})

for (const moment of ['while it is being frozen', 'while it is frozen'] as const)
  test(`a guest whose daemon is killed ${moment} is thawed at the next start`, async (t) => {
    const bench = await Bench.make(t)
    if (moment === 'while it is being frozen') bench.agent.manners[FREEZE] = 'silent'
    const frozen = bench.freezer(t).freeze('vm1')
    frozen.catch(() => undefined)
    await bench.agent.heard(1)
    if (moment === 'while it is frozen') await frozen
    bench.agent.isFrozen = true
    const left = bench.catalog.clone()
    bench.freezer(t, left).recover()
    await bench.agent.heard(2)
    while (left.list('frozen').length > 0) await new Promise(setImmediate)
    assert.ok(!bench.agent.isFrozen)
    assert.match(bench.reports[0] ?? '', /vm1 was frozen at .* and not thawed/)
  })

test('a thaw that fails is tried again until it is done, and nobody freezes the guest before', async (t) => {
  const bench = await Bench.make(t)
  const freezer = bench.freezer(t)
  await freezer.freeze('vm1')
  bench.agent.manners[THAW] = 'fail'
  assert.ok((await freezer.thaw('vm1')) !== undefined)
  assert.match(bench.reports[0] ?? '', /not thawed: .*; again in/)
  assert.equal(bench.noted, 1)
  await assert.rejects(freezer.freeze('vm1'), (error) => isBlockError(error, 'busy'))
  delete bench.agent.manners[THAW]
  await bench.agent.heard(3)
  while (bench.noted > 0) await new Promise(setImmediate)
  assert.ok(!bench.agent.isFrozen)
})

test('work that fails while the guest is frozen has it thawed, and so does work that takes too long', async (t) => {
  const bench = await Bench.make(t)
  const freezer = bench.freezer(t)
  await assert.rejects(
    freezer.during(['vm1'], () => Promise.reject(new Error('no moment'))),
    /no moment/,
  )
  assert.deepEqual([bench.agent.isFrozen, bench.noted], [false, 0])
  assert.equal(await freezer.during(['vm1'], async () => bench.agent.isFrozen), true)
  assert.equal(await freezer.during([], async () => 7), 7)
})
