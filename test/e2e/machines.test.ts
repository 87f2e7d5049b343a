// Machines and the queue of backups, by the command line on a real daemon: one moment for the disks of a machine, an outcome for each of
// those queued, the limits of the host, and a queue that a restart finds again.

import assert from 'node:assert/strict'
import fs from 'node:fs'
import { after, before, test } from 'node:test'
import { Random } from '../../src/base/random.ts'
import { FakeAgent } from '../support/fake-agent.ts'
import { MIB, Site, STATUS } from '../support/site.ts'

let site: Site

before(async () => {
  site = await Site.start({ args: ['--shards', '2'] })
  for (const disk of ['root', 'data', 'lone', 'other'])
    await site.done('disk', 'create', disk, site.path(`${disk}.raw`), '-f', 'raw', '--size', '4M')
})

after(() => site.end())

/** The jobs that are not over. */
async function open(): Promise<{ id: string; subject: string; state: string; details: Record<string, unknown> }[]> {
  const jobs = await site.daemon.api.call('listJobs', {}, {})
  return jobs.filter(({ endedMs }) => endedMs === undefined)
}

test('a machine is made of disks, and they are snapshot and backed up at one moment under its name', async () => {
  await site.done('machine', 'create', 'vm1', 'root', 'data')
  assert.match(await site.done('machine', 'list'), /vm1 +root data/)
  const refused = await site.varve('disk', 'remove', 'root')
  assert.equal(refused.status, STATUS.busy)
  assert.match(refused.stderr, /of machine vm1: varve machine remove vm1 root/)
  const taken = await site.varve('disk', 'create', 'vm1', site.path('vm1.raw'), '-f', 'raw', '--size', '1M')
  assert.match(taken.stderr, /there is a machine vm1/)
  const snapshots = JSON.parse(await site.done('snapshot', 'create', 'vm1', 'first', '--json')) as { disk: string }[]
  assert.deepEqual(
    snapshots.map(({ disk }) => disk),
    ['root', 'data'],
  )
  assert.match(await site.done('backup', 'vm1', '--repo', site.repository), /root: full .*\ndata: full /)
  const [listed] = JSON.parse(await site.done('backups', '--repo', site.repository, '--json')) as {
    machine: string
    disks: { name: string }[]
  }[]
  assert.equal(listed?.machine, 'vm1')
  assert.deepEqual(
    listed?.disks.map(({ name }) => name),
    ['root', 'data'],
  )
})

test('all machines are backed up by one command, which says how each fared; one that fails stops no other', async () => {
  const said = await site.done('backup', '--all', '--repo', site.repository)
  assert.match(said, /^vm1: incremental .*\nlone: full .*\nother: full .*\n3 of 3 machines backed up$/)
  await site.done('machine', 'create', 'vm2', 'lone', 'other')
  const again = JSON.parse(await site.done('backup', 'vm2', 'vm1', '--repo', site.repository, '--json')) as {
    done: number
    machines: { machine: string; kind: string }[]
  }
  assert.deepEqual(
    again.machines.map(({ machine, kind }) => `${machine}: ${kind}`),
    ['vm2: incremental', 'vm1: incremental'],
  )
  const missing = await site.varve('backup', '--all', '--repo', site.path('nowhere'))
  assert.equal(missing.status, STATUS.failed)
  assert.match(missing.stdout, /vm1: failed: .*\nvm2: failed: .*\n0 of 2 machines backed up, 2 failed/)
})

test('queued backups wait for their window, say so, can be cancelled at once, and a restart finds the rest', async () => {
  const hour = new Date().getHours()
  const far = (hour + 12) % 24
  await site.done('host', 'set', '--window', `${far}:00-${far}:01`)
  await site.done('backup', '--all', '--no-wait', '--repo', site.repository)
  const queued = await open()
  assert.equal(queued.length, 2)
  for (const { state, details } of queued) {
    assert.equal(state, 'created')
    assert.match(String(details['waits']), /^the window .* opens at /)
  }
  assert.match(await site.done('job', 'list'), /the window/)
  const [first, second] = queued.toSorted((a, b) => a.subject.localeCompare(b.subject))
  const cancelled = await site.daemon.api.call('sayToJob', { job: String(first?.id), verb: 'cancel' }, {})
  assert.ok(['aborting', 'concluded'].includes(cancelled.state))
  assert.equal((await site.daemon.api.follow(String(first?.id), () => undefined)).error?.kind, 'cancelled')
  // Nothing that waits is in the way of other work.
  await site.done('disk', 'resize', 'lone', '5M')
  await site.daemon.kill()
  await site.daemon.start()
  assert.deepEqual(
    (await open()).map(({ id }) => id),
    [second?.id],
  )
  await site.done('host', 'set', '--window', 'any')
  const ended = await site.daemon.api.follow(String(second?.id), () => undefined)
  assert.equal(ended.error, undefined)
  assert.equal(ended.subject, 'vm2')
})

test('queued machines make a checkpoint each, and differentials since it', async () => {
  await site.done('backup', '--all', '--repo', site.repository, '--checkpoint', 'monday')
  const said = await site.done('--json', 'backup', '--all', '--repo', site.repository, '--since', 'monday')
  const { machines } = JSON.parse(said) as { machines: { machine: string; kind: string }[] }
  assert.deepEqual(
    machines.map(({ kind }) => kind),
    machines.map(() => 'incremental'),
  )
  await site.done('checkpoint', 'remove', 'lone', 'monday')
  const second = await site.varve('backup', '--all', '--repo', site.repository, '--since', 'monday')
  assert.equal(second.status, STATUS.failed)
  assert.match(second.stdout, /vm1: incremental /)
  assert.match(second.stdout, /vm2: failed: disk lone has no checkpoint monday/)
})

test('what a window breaks off is queued again, and whoever follows it follows on', async () => {
  await site.done('host', 'set', '--window', 'any', '--window-end', 'break', '--bandwidth', '64K')
  const guest = await site.guest('lone')
  await guest.write(0, 2 * MIB, new Random(7).fill(Buffer.alloc(2 * MIB)), 0, 0)
  await guest.close()
  await site.done('backup', 'vm2', '--queue', '--full', '--no-wait', '--repo', site.repository)
  const [first] = await open()
  const id = String(first?.id)
  while ((await site.daemon.api.call('showJob', { job: id }, {})).done === 0)
    await new Promise((resolve) => setTimeout(resolve, 20))
  const far = (new Date().getHours() + 12) % 24
  await site.done('host', 'set', '--window', `${far}:00-${far}:01`)
  const broken = await site.daemon.api.follow(id, () => undefined)
  assert.equal(broken.error?.kind, 'timeout')
  const next = await open()
  assert.deepEqual(
    next.map((job) => [job.id, job.subject, job.state]),
    [[broken.details['queuedAgain'], 'vm2', 'created']],
  )
  await site.daemon.kill()
  await site.daemon.start()
  await site.done('host', 'set', '--window', 'any', '--window-end', 'finish', '--bandwidth', 'default')
  assert.equal((await site.daemon.api.follow(String(next[0]?.id), () => undefined)).error, undefined)
})

test('the limits of the host are kept, and refused when they cannot be', async () => {
  await site.done('host', 'set', '--machines', '2', '--scratch-host', '64M', '--bandwidth', '100M')
  await site.daemon.kill()
  await site.daemon.start()
  const shown = await site.done('host', 'show')
  assert.match(shown, /machines at a time: 2\nscratch: 4.00 GiB a disk, 64.0 MiB in all/)
  assert.match(shown, /bandwidth: 100.0 MiB a second\nwindow: at any time\nrunning: nothing; waiting: 0/)
  await site.done('host', 'set', '--machines', 'default', '--bandwidth', '0')
  assert.match(await site.done('host', 'show'), /machines at a time: 1\n/)
  for (const args of [['--machines', '0'], ['--window', '22-06'], ['--bandwidth', '1K'], []])
    assert.equal((await site.varve('host', 'set', ...args)).status, STATUS.usage, args.join(' '))
})

test('the guest of a machine is frozen for its moments, and thawed also when the daemon is killed meanwhile', async (t) => {
  const agent = await FakeAgent.listen(site.path('qga.sock'))
  t.after(() => agent.close())
  assert.match(
    await site.done('machine', 'set', 'vm2', '--agent', agent.socket),
    /frozen by the guest agent at .* 10 s/,
  )
  const [freeze, thaw] = ['guest-fsfreeze-freeze', 'guest-fsfreeze-thaw']
  await site.done('backup', 'vm2', '--repo', site.repository)
  await site.done('snapshot', 'create', 'vm2', 'frozen')
  // A disk by its own name has the same guest.
  await site.done('snapshot', 'create', 'lone', 'alone')
  assert.deepEqual(agent.asked, [freeze, thaw, freeze, thaw, freeze, thaw])
  agent.manners[freeze] = 'fail'
  const refused = await site.varve('backup', 'vm2', '--repo', site.repository)
  assert.equal(refused.status, STATUS.failed)
  assert.match(refused.stderr, /refuses guest-fsfreeze-freeze/)
  agent.manners[freeze] = 'silent'
  const cut = site.begin('backup', 'vm2', '--repo', site.repository)
  await agent.heard(9)
  agent.isFrozen = true
  await site.daemon.kill()
  await cut.ended
  delete agent.manners[freeze]
  await site.daemon.start()
  await agent.heard(10)
  assert.equal(agent.asked[9], thaw)
  const log = site.path('hooks.log')
  const commands = [
    '--freeze-command',
    `echo $VARVE_MACHINE frozen >> ${log}`,
    '--thaw-command',
    `echo thawed >> ${log}`,
  ]
  await site.done('machine', 'set', 'vm2', ...commands)
  await site.done('snapshot', 'create', 'vm2', 'by-commands')
  assert.equal(fs.readFileSync(log, 'utf8'), 'vm2 frozen\nthawed\n')
  assert.doesNotMatch(await site.done('machine', 'set', 'vm2', '--no-freeze'), /frozen/)
  assert.equal((await site.varve('machine', 'set', 'vm2')).status, STATUS.usage)
})

test('a backup hears of the guests of all its disks, also of those that live in another thread', async () => {
  const guest = await site.guest('lone')
  await guest.write(0, 4 * MIB, Buffer.alloc(4 * MIB, 7), 0, 0)
  await guest.close()
  const busy = await site.guest('other')
  const wish = { disks: ['lone', 'other'], repository: site.repository, full: true, speed: MIB / 2, guestLatency: 5 }
  const { id } = await site.daemon.api.call('backup', {}, wish)
  const buffer = Buffer.alloc(4096)
  // Nobody uses the disk in the thread that copies: what is heard comes from the other one.
  for (;;) {
    await busy.read(0, 4096, buffer, 0)
    const { guest: heard, endedMs } = await site.daemon.api.call('showJob', { job: id }, {})
    if (heard !== undefined) break
    assert.equal(endedMs, undefined)
  }
  await busy.close()
  await site.daemon.api.call('sayToJob', { job: id, verb: 'cancel' }, {})
  await site.daemon.api.follow(id, () => undefined)
})

test('a machine lets disks go, and is forgotten; its disks stay', async () => {
  await site.done('machine', 'remove', 'vm1', 'data')
  assert.equal(await site.done('machine', 'show', 'vm1'), 'vm1: root')
  await site.done('machine', 'remove', 'vm1')
  assert.equal((await site.varve('machine', 'show', 'vm1')).status, STATUS.notFound)
  await site.done('disk', 'show', 'root')
})
