// Migrations between two daemons as a user has them, over a line that takes 20 ms each way and can be cut, under a guest that writes: what
// goes along, what the guest notices, and what is left when either side dies or the line is cut at a bad moment. A longer run
// with a table of outcomes is run-migrations.ts.

import assert from 'node:assert/strict'
import { type TestContext, test } from 'node:test'
import { allocated, checkEqual, contentOf, type Guest, Pair, type PairOptions } from '../support/migration.ts'
import { MIB } from '../support/site.ts'

interface Setting {
  readonly pair: Pair
  readonly guest: Guest
}

async function setUp(t: TestContext, options: PairOptions = {}): Promise<Setting> {
  const pair = await Pair.start(options)
  t.after(() => pair.end())
  const guest = await pair.makeDisk(7)
  t.after(() => guest.leave())
  return { pair, guest }
}

/** The disk at the target is what the guest wrote, its snapshots are what they were. */
async function checkTarget({ pair, guest }: Setting, name = 'vm1'): Promise<void> {
  const { target } = pair
  const shown = await target.daemon.api.call('showDisk', { disk: name }, {})
  assert.equal(shown.state, 'open')
  checkEqual(await contentOf(shown.uri ?? ''), guest.content, 'the disk at the target')
  for (const snapshot of ['monday', 'tuesday']) {
    const { uri } = await target.daemon.api.call('exportSnapshot', { disk: name, snapshot }, {})
    checkEqual(await contentOf(uri), guest.contentAt(snapshot), `snapshot ${snapshot} at the target`)
    await target.done('snapshot', 'unexport', name, snapshot)
  }
}

test('a disk moves under a guest that writes, with its snapshots and bitmaps; the guest goes on, passed on by the source', async (t) => {
  const { pair, guest } = await setUp(t)
  const { source, target } = pair
  const snapshots = await source.daemon.api.call('listSnapshots', { disk: 'vm1' }, {})
  guest.start()
  const said = await source.done('migrate', 'vm1', pair.uri)
  assert.match(
    said,
    /concluded; varve\+unix:.*line\.sock holds the disk; its guests are passed on; the guest waited \d+ ms/,
  )
  const passed = guest.acknowledged
  while (guest.acknowledged < passed + 20) await new Promise((resolve) => setTimeout(resolve, 10))
  await guest.pause()
  await guest.check('passed on')
  assert.deepEqual(await pair.writers(), ['target'])
  await checkTarget({ pair, guest })
  const after = await target.daemon.api.call('listSnapshots', { disk: 'vm1' }, {})
  assert.deepEqual(
    after.map(({ name, createdMs }) => ({ name, createdMs })),
    snapshots.map(({ name, createdMs }) => ({ name, createdMs })),
  )
  const { bitmaps, layers } = await target.daemon.api.call('showDisk', { disk: 'vm1' }, {})
  assert.equal(bitmaps.length, 1)
  assert.match(
    await source.done('disk', 'show', 'vm1'),
    /vm1: moved.*\n.*\nmigration: moved to .* varve disk remove vm1/,
  )
  assert.match(await target.done('disk', 'show', 'vm1'), /migration: arrived from .*home/)
  const { layers: left } = await source.daemon.api.call('showDisk', { disk: 'vm1' }, {})
  // The active one grows with what the guest writes, which at the source it does no more.
  const [bytes = 0, before = 0] = [layers, left].map((all) =>
    all.slice(0, -1).reduce((sum, { path }) => sum + allocated(path), 0),
  )
  assert.ok(bytes < before + MIB, `sparse stays sparse: ${bytes} bytes of ${before}`)
  const backup = await target.done('backup', 'vm1', '--repo', source.repository, '--json')
  assert.match(backup, /incremental/)
})
