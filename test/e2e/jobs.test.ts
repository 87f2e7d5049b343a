// What a user says to jobs, and what jobs say: results that wait to be finalized, ended jobs that wait to be dismissed, the history, the
// rest time; and requests that cannot be, each refused in one line with everything as it was.

import assert from 'node:assert/strict'
import { type TestContext, test } from 'node:test'
import type { JobReply } from '../../src/api/schema.ts'
import { MIB, Site, STATUS } from '../support/site.ts'

const { usage, busy } = STATUS

/** A disk of 32 MiB with a snapshot, and 16 MiB over it. */
async function setUp(t: TestContext): Promise<Site> {
  const site = await Site.start()
  t.after(() => site.end())
  await site.disk('vm1', '32M')
  await write(site, 1, 4)
  await site.done('snapshot', 'create', 'vm1', 'first')
  await write(site, 2, 16)
  return site
}

async function write(site: Site, value: number, mib: number): Promise<void> {
  const guest = await site.guest('vm1')
  const block = Buffer.alloc(MIB, value)
  for (let at = 0; at < mib; at++) await guest.write(at * MIB, MIB, block, 0, 0)
  await guest.close()
}

async function list(site: Site, ...args: string[]): Promise<JobReply[]> {
  return JSON.parse(await site.done('job', 'list', '--json', ...args)) as JobReply[]
}

test('a commit that is finalized by hand waits, says what for, and takes effect when told', async (t) => {
  const site = await setUp(t)
  const follower = site.begin('commit', 'vm1', '--yes', '--finalize', 'manual')
  const [job] = await site.running()
  const id = job?.id ?? ''
  await site.job(id, ({ state }) => state === 'pending')
  const shown = await site.daemon.api.call('showDisk', { disk: 'vm1' }, {})
  assert.equal(shown.layers.length, 2)
  await site.refuses(['job', 'pause', id], busy, /is pending: pause cannot be said now; what can: cancel, finalize/)
  await write(site, 3, 2)
  await site.done('job', 'finalize', id)
  const { status, stderr } = await follower.ended
  assert.equal(status, STATUS.done, stderr)
  assert.match(
    stderr,
    new RegExp(`job ${id} is done but its effect: varve job finalize ${id}, or varve job cancel ${id}`),
  )
  const { layers, pauses } = await site.daemon.api.call('showDisk', { disk: 'vm1' }, {})
  assert.equal(layers.length, 1)
  assert.ok((pauses?.count ?? 0) > 0 && (pauses?.longestMs ?? 0) >= (pauses?.lastMs ?? Infinity))
  const guest = await site.guest('vm1')
  const found = Buffer.alloc(MIB)
  for (const [mib, value] of [3, 3, 2, 2].entries()) {
    await guest.read(mib * MIB, MIB, found, 0)
    assert.ok(found.equals(Buffer.alloc(MIB, value)))
  }
  await guest.close()
  await site.refuses(['job', 'finalize', id], busy, /has ended/)
})

test('the list has what runs and what needs a look, the history all', async (t) => {
  const site = await setUp(t)
  const started = await site.done('commit', 'vm1', '--yes', '--no-wait', '--json', '--speed', '2M')
  const { id } = JSON.parse(started) as JobReply
  const running = await site.job(id, ({ state, restMs }) => state === 'running' && restMs !== undefined)
  assert.ok((running.restMs ?? 0) > 0 && (running.restMs ?? Infinity) < 60_000, `${running.restMs} ms to go`)
  assert.match(await site.done('job', 'list'), new RegExp(`${id} .*running.*about \\d+ s to go`))
  await site.refuses(['job', 'dismiss', id], busy, /has not ended: varve job cancel/)
  await site.done('job', 'cancel', id)
  await site.job(id, ({ endedMs }) => endedMs !== undefined)
  assert.deepEqual(await list(site), [], 'what its user ended needs no look')
  assert.deepEqual(
    (await list(site, '--history')).map((job) => [job.id, job.state, job.error?.kind]),
    [[id, 'concluded', 'cancelled']],
  )

  await site.done('commit', 'vm1', '--yes', '--dismiss', 'manual')
  const [kept] = await list(site)
  assert.equal(kept?.state, 'concluded')
  await site.done('job', 'dismiss', kept?.id ?? '')
  assert.deepEqual(await list(site), [])
  assert.deepEqual(
    (await list(site, '--history')).map((job) => job.id),
    [kept?.id, id],
  )
  await site.daemon.stop()
  await site.daemon.start()
  assert.equal((await list(site, '--history')).length, 2, 'a restart keeps the history')
})

test('a job that cannot be run as asked is refused in one line, and nothing is changed', async (t) => {
  const site = await setUp(t)
  await site.done('clone', 'vm1', 'first', 'web')
  const before = await site.state()
  const copy = ['mirror', 'vm1', site.path('copy.raw'), '-f', 'raw']
  const refusals: readonly [args: string[], status: number, says: RegExp][] = [
    [['commit', 'vm1', '--yes'], busy, /commit of disk vm1.*held by disk web/],
    [['stream', 'vm1', '--yes'], busy, /held by disk web/],
    [['snapshot', 'delete', 'vm1', 'first'], busy, /held by disk web/],
    [['disk', 'remove', 'vm1'], busy, /held by disk web/],
    [['commit', 'web', '--yes'], busy, /vm1/],
    [
      ['stream', 'web', '--yes', '--on-error', 'ignore'],
      usage,
      /a stream has no --on-error ignore: .*enospc, report, stop/,
    ],
    [['commit', 'vm1', '--yes', '--on-error', 'perhaps'], usage, /report, ignore, stop, enospc/],
    [[...copy, '--finalize', 'manual'], usage, /a mirror is not finalized by hand: .*varve job complete/],
    [[...copy, '--guest-latency', 'low'], usage, /"low" is no latency/],
    [[...copy, '--speed', 'fast'], usage, /"fast" is not a size/],
  ]
  for (const [args, status, says] of refusals) await site.refuses(args, status, says)
  assert.deepEqual(await site.state(), before)
})

test('while a job runs on a disk a revert of it is refused by the job’s name, whatever kind of job', async (t) => {
  const site = await setUp(t)
  const slow = ['--no-wait', '--json', '--speed', '100K']
  const copy = ['mirror', 'vm1', site.path('copy.raw'), '-f', 'raw']
  const kinds = [
    copy,
    ['commit', 'vm1', '--yes'],
    ['stream', 'vm1', '--yes'],
    ['backup', 'vm1', '--repo', site.repository],
  ]
  for (const kind of kinds) {
    const { id } = JSON.parse(await site.done(...kind, ...slow)) as JobReply
    await site.refuses(
      ['snapshot', 'revert', 'vm1', 'first', '-y'],
      busy,
      kind[0] === 'commit' ? /no snapshot first|has to wait/ : new RegExp(`revert has to wait: job ${id}`),
    )
    await site.done('job', 'cancel', id)
    await site.job(id, ({ endedMs }) => endedMs !== undefined)
    if (kind[0] === 'commit') await site.done('snapshot', 'create', 'vm1', 'first')
  }
  const guest = await site.guest('vm1')
  const found = Buffer.alloc(MIB)
  await guest.read(15 * MIB, MIB, found, 0)
  assert.ok(found.equals(Buffer.alloc(MIB, 2)))
  await guest.close()
})
