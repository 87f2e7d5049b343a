// Migrations between two daemons as a user has them, over a line that takes 20 ms each way and can be cut, under a guest that writes: what
// goes along, what the guest notices, and what is left when either side dies or the line is cut at a bad moment. A longer run
// with a table of outcomes is run-migrations.ts.

import assert from 'node:assert/strict'
import fs from 'node:fs'
import net from 'node:net'
import { type TestContext, test } from 'node:test'
import { Random } from '../../src/base/random.ts'
import { freePort } from '../support/free-port.ts'
import { allocated, checkEqual, contentOf, type Guest, Pair, type PairOptions } from '../support/migration.ts'
import { MIB, Site, STATUS } from '../support/site.ts'
import { strikeOnce } from '../support/strikes.ts'
import { makeCredentials } from '../support/tls.ts'

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

for (const [strike, afterMs] of [
  ['source killed', 60],
  ['target killed', 60],
  ['line cut', 60],
] as const) {
  test(`${strike} while the switch-over begins: no write is lost, never two write, and one command ends what does not end by itself`, async (t) => {
    const pair = await Pair.start()
    t.after(() => pair.end())
    await strikeOnce(pair, 'vm1', strike, { in: 'switch-over', afterMs }, new Random(3))
  })
}

test('what a migration left is named on both sides, and a disk is removed where nobody needs it any more', async (t) => {
  const { pair, guest } = await setUp(t, { delayMs: 0 })
  const { source, target } = pair
  const id = await pair.begin('vm1', '--no-complete')
  await pair.job(id, ({ state }) => state === 'ready')
  assert.match(
    await target.done('disk', 'show', 'vm1'),
    /vm1: incoming.*\nmigration: arrives from .*: to give the copy up, varve disk remove vm1/,
  )
  await target.refuses(['snapshot', 'create', 'vm1', 'mine'], STATUS.busy, /disk vm1: arrives from/)
  await target.refuses(['migrate', 'vm1', '--settle', '--force', '--yes'], STATUS.busy, /arrives from/)
  await source.refuses(['snapshot', 'create', 'vm1', 'mine'], STATUS.busy, new RegExp(`job ${id} is at work`))
  await source.refuses(['backup', 'vm1', '--repo', source.repository], STATUS.busy, new RegExp(`job ${id} is at work`))
  await source.done('job', 'complete', id)
  await source.refuses(
    ['snapshot', 'create', 'vm1', 'mine'],
    STATUS.busy,
    /disk vm1: moved to .*: varve disk remove vm1/,
  )
  await source.refuses(['migrate', 'vm1', '--settle'], STATUS.usage, /there is nothing to settle/)
  await target.refuses(['disk', 'remove', 'vm1'], STATUS.busy, /cannot be removed yet: arrived from/)
  await guest.check('passed on')
  await guest.leave()
  await source.done('disk', 'remove', 'vm1')
  assert.doesNotMatch(await target.done('disk', 'show', 'vm1'), /migration/)
  await checkTarget({ pair, guest })
  await target.done('disk', 'remove', 'vm1')
})

test('a disk that is passed on stays so over restarts of both sides, and its guest waits while the target is away', async (t) => {
  const { pair, guest } = await setUp(t, { delayMs: 0 })
  await pair.source.done('migrate', 'vm1', pair.uri)
  await pair.target.daemon.stop()
  const written = guest.write()
  await pair.target.daemon.start()
  await written
  await pair.source.daemon.stop()
  await pair.source.daemon.start()
  await guest.write()
  await pair.target.daemon.kill()
  await pair.source.daemon.kill()
  await pair.source.daemon.start()
  const late = guest.write()
  await pair.target.daemon.start()
  await late
  await guest.check('after restarts')
  await checkTarget({ pair, guest })
})

test('with --hand-over the source hangs up, and the guest finds all it wrote at the target', async (t) => {
  const { pair, guest } = await setUp(t, { delayMs: 0 })
  const { source, target } = pair
  assert.match(
    await source.done('migrate', 'vm1', pair.uri, '--hand-over', '--name', 'web'),
    /holds the disk; the guest waited/,
  )
  assert.match(await source.done('disk', 'show', 'vm1'), /vm1: moved.*\nmigration: moved to .* is served there alone/)
  await checkTarget({ pair, guest }, 'web')
  assert.doesNotMatch(await target.done('disk', 'show', 'web'), /migration/)
  await source.done('disk', 'remove', 'vm1')
})

test('a migration that is cancelled, while it copies or while it is ready, leaves the disk as it was and nothing at the target', async (t) => {
  const { pair, guest } = await setUp(t, { delayMs: 0 })
  const { source, target } = pair
  for (const [state, ...options] of [
    ['running', '--speed', '1M'],
    ['ready', '--no-complete'],
  ] as const) {
    const id = await pair.begin('vm1', ...options)
    await pair.job(id, (status) => status.state === state)
    await source.done('job', 'cancel', id)
    const ended = await pair.job(id, ({ endedMs }) => endedMs !== undefined)
    assert.equal(ended?.error?.kind, 'cancelled')
    assert.equal(await target.done('disk', 'list', '--json'), '[]')
    assert.deepEqual(fs.readdirSync(target.path('home', 'images')), [])
  }
  await guest.check('as before')
  const { bitmaps, state } = await source.daemon.api.call('showDisk', { disk: 'vm1' }, {})
  assert.equal(state, 'open')
  assert.ok(bitmaps.every(({ name }) => !name.startsWith('job:')))
})

test('over TCP a migration needs TLS and the token; what cannot be is refused in one line, and nothing is changed', async (t) => {
  const { folder, strangerFolder } = makeCredentials(t)
  const port = await freePort()
  const source = await Site.start()
  t.after(() => source.end())
  const target = await Site.start({ args: ['--api-port', String(port), '--tls-certificates', folder] })
  t.after(() => target.end())
  await source.disk('vm1', '4M')
  await source.disk('taken', '4M')
  await target.disk('taken', '4M')
  const token = target.path('home', 'api.token')
  assert.equal(fs.statSync(token).mode & 0o777, 0o600)
  const wrong = source.path('wrong.token')
  fs.writeFileSync(wrong, 'wrong\n')
  const uri = `varve+tls://127.0.0.1:${port}/`
  const right = ['--token-file', token, '--tls-certificates', folder]
  const closed = await freePort()
  const before = [await source.state(), await target.state()]
  const refusals: readonly [args: readonly string[], status: number, says: RegExp][] = [
    [['vm1'], STATUS.usage, /name the daemon to migrate to/],
    [['vm1', 'nbd://x/y'], STATUS.usage, /name the daemon to migrate to/],
    [['vm1', uri], STATUS.usage, /the token is missing: copy api\.token/],
    [['vm1', uri, ...right.slice(2), '--token-file', wrong], STATUS.failed, /the token is wrong/],
    [
      ['vm1', uri, ...right.slice(2), '--token-file', source.path('none')],
      STATUS.notFound,
      /token of the other daemon/,
    ],
    [['vm1', uri, '--token-file', token], STATUS.failed, /TLS: the handshake with the server failed/],
    [['vm1', `varve+tls://127.0.0.1:${closed}/`, ...right], STATUS.failed, /cannot be reached: .*--api-port/],
    [['taken', uri, ...right], STATUS.busy, /there is a disk taken already/],
    [['vm1', uri, ...right, '--image', 'relative.qcow2'], STATUS.usage, /needs an absolute path/],
    [['vm1', uri, ...right, '--image', target.path('taken.qcow2')], STATUS.busy, /is there already at the target/],
    [['none', uri, ...right], STATUS.notFound, /there is no disk none/],
    [['vm1', `varve+unix://${source.home}/run/api.sock`], STATUS.usage, /the target is the daemon that has disk vm1/],
    [['vm1', '--settle'], STATUS.usage, /no migration of it is under way/],
    [['vm1', '--settle', '--force'], STATUS.usage, /say --yes to go on/],
    [['vm1', uri, '--force'], STATUS.usage, /--force goes with --settle/],
  ]
  for (const [args, status, says] of refusals) await source.refuses(['migrate', ...args], status, says)
  assert.deepEqual([await source.state(), await target.state()], before)
  assert.ok(fs.existsSync(strangerFolder))
  const plain = net.connect(port, '127.0.0.1', () => plain.write('GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n'))
  const said: Buffer[] = []
  for await (const chunk of plain) said.push(chunk as Buffer)
  assert.doesNotMatch(Buffer.concat(said).toString('latin1'), /HTTP/, 'nothing is said without TLS')
  assert.match(await source.done('migrate', 'vm1', uri, ...right), /concluded/)
  assert.equal((await target.daemon.api.call('showDisk', { disk: 'vm1' }, {})).state, 'open')
})

test('a target that speaks another version of the conversation refuses before anything is made', async (t) => {
  const target = await Site.start()
  t.after(() => target.end())
  const request = { token: '0'.repeat(32), disk: 'vm1', size: MIB, format: 'raw', cache: 'writeback' } as const
  await assert.rejects(
    target.daemon.api.call('prepareIncoming', {}, { ...request, protocol: 2, home: 'another', from: 'there' }),
    { kind: 'unsupported', message: /by protocol 1, the other one by 2: run the same version/ },
  )
  assert.equal(await target.done('disk', 'list', '--json'), '[]')
})
