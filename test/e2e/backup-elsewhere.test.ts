// varve backup --from: a command on another machine than the daemon, over TCP with TLS and the token, into a repository that it opens
// itself; a command that is killed, one that hangs, and a daemon that dies meanwhile.

import assert from 'node:assert/strict'
import fs from 'node:fs'
import path from 'node:path'
import { type TestContext, test } from 'node:test'
import { Random } from '../../src/base/random.ts'
import { freePort } from '../support/free-port.ts'
import { beginCommand, checkRefusal, MIB, type Running, Site, STATUS } from '../support/site.ts'
import { makeCredentials } from '../support/tls.ts'

const SIZE = 16 * MIB

/** So that it does not end by itself. */
const SLOWLY = ['--speed', '64K']

interface Setting {
  readonly site: Site
  readonly content: Buffer
  /** How the daemon is reached. */
  readonly from: readonly string[]
}

/** A daemon with a disk of random data; the repository is the client's. */
async function setUp(
  t: TestContext,
  options: { readonly tls?: boolean; readonly args?: string[] } = {},
): Promise<Setting> {
  const { args = [] } = options
  if (options.tls !== true) {
    const site = await Site.start({ args })
    t.after(() => site.end())
    return { site, content: await fill(site), from: ['--from', `varve+unix://${site.home}/run/api.sock`] }
  }
  const { folder } = makeCredentials(t)
  const port = await freePort()
  const site = await Site.start({ args: ['--api-port', String(port), '--tls-certificates', folder, ...args] })
  t.after(() => site.end())
  const token = site.path('home', 'api.token')
  const from = ['--from', `varve+tls://127.0.0.1:${port}/`, '--token-file', token, '--tls-certificates', folder]
  return { site, content: await fill(site), from }
}

async function fill(site: Site): Promise<Buffer> {
  await site.disk('vm1', String(SIZE))
  const content = Buffer.alloc(SIZE)
  new Random(5).fill(content)
  const guest = await site.guest('vm1')
  for (let at = 0; at < SIZE; at += MIB) await guest.write(at, MIB, content, at, 0)
  await guest.close()
  return content
}

async function write({ site, content }: Setting, offset: number, length: number, value: number): Promise<void> {
  content.fill(value, offset, offset + length)
  const guest = await site.guest('vm1')
  await guest.write(offset, length, content, offset, 0)
  await guest.close()
}

/** The client has a home of its own, at which no daemon listens. */
function begin({ site, from }: Setting, ...args: string[]): Running {
  const home = ['--home', site.path('elsewhere')]
  return beginCommand(['backup', 'vm1', '--repo', site.repository, ...from, ...args, ...home])
}

interface Outcome {
  readonly isCompleted: boolean
  readonly details: {
    readonly backup: string
    readonly readBytes: number
    readonly disks: readonly { kind: string; reason: string }[]
  }
}

/** A backup that must be good, and what it restores to. */
async function good(setting: Setting, ...args: string[]): Promise<Outcome['details']> {
  const { site, content } = setting
  const { status, stdout, stderr } = await begin(setting, ...args, '--json').ended
  assert.equal(status, STATUS.done, stderr)
  const { details, isCompleted } = JSON.parse(stdout) as Outcome
  assert.ok(isCompleted)
  const image = site.path(`${details.backup}.raw`)
  await site.done('restore', details.backup, '--repo', site.repository, '--to', image)
  assert.ok(fs.readFileSync(image).equals(content), `${details.backup} is the disk`)
  fs.rmSync(image)
  return details
}

/** Nothing is left of views: no job, no export, no captured bits, no scratch. */
async function assertNothingLeft({ site }: Setting): Promise<void> {
  const jobs = await site.daemon.api.call('listJobs', {}, {})
  assert.deepEqual(
    jobs.filter(({ endedMs }) => endedMs === undefined),
    [],
  )
  assert.deepEqual(fs.readdirSync(site.path('home', 'run', 'nbd')), ['vm1.sock'])
  const { bitmaps } = await site.daemon.api.call('showDisk', { disk: 'vm1' }, {})
  assert.ok(
    bitmaps.every(({ name }) => !name.endsWith(':captured')),
    JSON.stringify(bitmaps),
  )
  const disks = fs.readdirSync(site.path('home', 'disks'))
  for (const disk of disks) assert.ok(!fs.existsSync(path.join(site.path('home', 'disks'), disk, 'scratch')))
}

/** The view of a client that reads: by then it works in the repository. */
async function viewOf(site: Site): Promise<string> {
  for (;;) {
    const jobs = await site.daemon.api.call('listJobs', {}, {})
    const view = jobs.find(({ kind, state }) => kind === 'view' && state === 'pending')
    const isAtWork = view !== undefined && fs.readdirSync(path.join(site.repository, 'sessions')).length > 0
    if (isAtWork) return view.id
    await new Promise((resolve) => setTimeout(resolve, 10))
  }
}

test('over TLS a full, then incrementals and a proof; the daemon and a client share the bits of one repository', async (t) => {
  const setting = await setUp(t, { tls: true })
  const { site } = setting
  const full = await good(setting)
  assert.deepEqual([full.disks[0]?.kind, full.readBytes], ['full', SIZE])
  await write(setting, MIB, 8192, 1)
  const second = await good(setting, '--prove', '50%')
  assert.deepEqual([second.disks[0]?.kind, second.readBytes], ['incremental', 8192])
  await write(setting, 2 * MIB, 4096, 2)
  assert.match(
    await site.done('backup', 'vm1', '--repo', site.repository),
    new RegExp(`incremental \\(changes since ${second.backup}`),
  )
  await write(setting, 3 * MIB, 4096, 3)
  assert.equal((await good(setting)).readBytes, 4096)
  assert.match(await site.done('verify', full.backup, '--repo', site.repository), /whole/)
  const listed = (await site.done('backups', '--repo', site.repository)).match(/\d{8}T\d{9}Z-[0-9a-f]{8}/g) ?? []
  assert.equal(listed.length, 4)
  await site.done('repo', 'forget', site.repository, ...listed.slice(1))
  const compared = await good(setting)
  assert.match(compared.disks[0]?.reason ?? '', /no longer in the repository/)
  assert.equal(compared.disks[0]?.kind, 'full')
  await assertNothingLeft(setting)
})

test('a client’s backups make checkpoints and copy what changed since one; where its repository lacks that, the usual way', async (t) => {
  const setting = await setUp(t)
  const { site, from } = setting
  await good(setting, '--checkpoint', 'monday')
  await write(setting, MIB, 8192, 1)
  assert.equal((await good(setting)).readBytes, 8192)
  await write(setting, 2 * MIB, 4096, 2)
  const since = await good(setting, '--since', 'monday', '--checkpoint', 'tuesday')
  assert.equal(since.readBytes, 12_288)
  assert.match(since.disks[0]?.reason ?? '', /^differential, changes since checkpoint monday: /)
  await write(setting, 3 * MIB, 4096, 3)
  const own = await site.done('backup', 'vm1', '--repo', site.repository, '--since', 'tuesday')
  assert.match(own, /incremental \(differential, changes since checkpoint tuesday: /)
  const other = site.path('other')
  await site.done('repo', 'init', other)
  const elsewhere = ['backup', 'vm1', '--repo', other, ...from]
  await site.done(...elsewhere)
  await write(setting, 4 * MIB, 4096, 4)
  const said = await site.done(...elsewhere, '--since', 'monday')
  assert.match(
    said,
    /incremental \(changes since .*; not since monday: the earlier backup .* is no longer in the repository/,
  )
  assert.match(said, /read 4.00 KiB/)
  const unknown = await site.varve(...elsewhere, '--since', 'sunday')
  assert.equal(unknown.status, STATUS.notFound)
  const both = await site.varve(...elsewhere, '--since', 'monday', '--full')
  assert.equal(both.status, STATUS.usage)
  await assertNothingLeft(setting)
})

test('a wrong token, a daemon that is not there and a bad address are refused in one line', async (t) => {
  const setting = await setUp(t, { tls: true })
  const { site, from } = setting
  const wrong = site.path('wrong.token')
  fs.writeFileSync(wrong, 'wrong\n')
  for (const [more, status, says] of [
    [[...from, '--token-file', wrong], STATUS.failed, /the token is wrong/],
    [['--from', `varve+unix://${site.path('none')}/api.sock`], STATUS.failed, /none\/api\.sock/],
    [['--from', 'nbd://x/y'], STATUS.usage, /is not the URI of a daemon/],
    [[...from, '--no-wait'], STATUS.usage, /ends with it/],
    [[...from, '--all'], STATUS.usage, /name machines to back up, or say --all/],
  ] as const) {
    const args = ['backup', 'vm1', '--repo', site.repository, ...more, '--home', site.path('elsewhere')]
    checkRefusal(args, await beginCommand(args).ended, status, says)
  }
  await assertNothingLeft(setting)
})

test('a client that is killed and begins anew has its view replaced; past the lease the view is gone by itself', async (t) => {
  const setting = await setUp(t)
  const { site } = setting
  await good(setting)
  await write(setting, 0, 12 * MIB, 7)
  const first = begin(setting, ...SLOWLY)
  const old = await viewOf(site)
  first.child.kill('SIGKILL')
  await first.ended
  assert.deepEqual((await good(setting)).readBytes, 12 * MIB)
  assert.match((await site.daemon.api.call('showJob', { job: old }, {})).error?.message ?? '', /began anew/)
  await write(setting, 0, 2 * MIB, 8)
  const second = begin(setting, ...SLOWLY, '--lease', '0.5')
  const left = await viewOf(site)
  second.child.kill('SIGKILL')
  await second.ended
  const ended = await site.job(left, ({ endedMs }) => endedMs !== undefined)
  assert.match(ended.error?.message ?? '', /nobody read the view/)
  await assertNothingLeft(setting)
  assert.equal((await good(setting)).readBytes, 2 * MIB)
})

test('a client that hangs loses its view to the lease, says so when it wakes, and the next backup is right', async (t) => {
  const setting = await setUp(t)
  const { site } = setting
  await good(setting)
  await write(setting, 0, 8 * MIB, 9)
  const client = begin(setting, ...SLOWLY, '--lease', '1')
  const view = await viewOf(site)
  client.child.kill('SIGSTOP')
  const ended = await site.job(view, ({ endedMs }) => endedMs !== undefined)
  assert.match(ended.error?.message ?? '', /nobody read the view for 1000 ms/)
  await assertNothingLeft(setting)
  client.child.kill('SIGCONT')
  const { status, stderr } = await client.ended
  assert.notEqual(status, STATUS.done)
  assert.match(stderr, /there is no view|has ended|closed/)
  const next = await good(setting)
  assert.equal(next.disks[0]?.kind, 'incremental')
})

test('a daemon that is killed under a client fails that at once when it is back, and the next backup is right', async (t) => {
  const setting = await setUp(t)
  const { site } = setting
  await good(setting)
  await write(setting, 0, 8 * MIB, 9)
  const client = begin(setting, ...SLOWLY)
  await viewOf(site)
  await site.daemon.kill()
  await site.daemon.start()
  const { status, stderr } = await client.ended
  assert.equal(status, STATUS.notFound, stderr)
  await assertNothingLeft(setting)
  const next = await good(setting)
  assert.equal(next.disks[0]?.kind, 'incremental')
})

test('Ctrl-C gives a backup up: the view ends, the bits are back', async (t) => {
  const setting = await setUp(t)
  const { site } = setting
  await good(setting)
  await write(setting, 0, 8 * MIB, 9)
  const client = begin(setting, ...SLOWLY)
  await viewOf(site)
  client.child.kill('SIGINT')
  const { status, stderr } = await client.ended
  assert.equal(status, STATUS.failed)
  assert.match(stderr, /was interrupted/)
  await assertNothingLeft(setting)
  assert.equal((await good(setting)).readBytes, 8 * MIB)
})
