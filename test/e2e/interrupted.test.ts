// Interruptions: a follower that is stopped, a daemon that is told to stop or killed in the middle of merges and backups. The work
// goes on, the guest's data is right, and whoever waited is told.

import assert from 'node:assert/strict'
import fs from 'node:fs'
import { type TestContext, test } from 'node:test'
import { Random } from '../../src/base/random.ts'
import type { JobReply } from '../../src/api/schema.ts'
import { checkRefusal, MIB, Site, STATUS } from '../support/site.ts'

const STOP_MS = 5000

interface Setting {
  readonly site: Site
  /** What the disk vm1 holds. */
  readonly content: Buffer
}

/** A disk of 16 MiB, half of it in an overlay over a snapshot, and a backup of the base. */
async function setUp(t: TestContext): Promise<Setting> {
  const site = await Site.start()
  t.after(() => site.end())
  await site.disk('vm1', '16M')
  const content = Buffer.alloc(16 * MIB)
  new Random(5).fill(content)
  const guest = await site.guest('vm1')
  for (let at = 0; at < 8; at++) await guest.write(at * MIB, MIB, content, at * MIB, 0)
  await site.done('backup', 'vm1', '--repo', site.repository)
  await site.done('snapshot', 'create', 'vm1', 'before')
  for (let at = 8; at < 16; at++) await guest.write(at * MIB, MIB, content, at * MIB, 0)
  await guest.close()
  return { site, content }
}

const WORK = {
  commit: (_site: Site): string[] => ['commit', 'vm1', '--yes', '--speed', '1M'],
  stream: (_site: Site): string[] => ['stream', 'vm1', '--yes', '--speed', '1M'],
  mirror: (site: Site): string[] => ['mirror', 'vm1', site.path('m.raw'), '-f', 'raw', '--complete', '--speed', '1M'],
  backup: (site: Site): string[] => ['backup', 'vm1', '--repo', site.repository, '--speed', '1M'],
} as const

/** The only running job, when it has done something. */
async function underWay(site: Site): Promise<JobReply> {
  const [job] = await site.running()
  return site.job(job?.id ?? '', ({ done, total }) => done > 0 && done < total)
}

/** Lets the job run fast to its end, which must be good. */
async function endsWell(site: Site, id: string): Promise<JobReply> {
  await site.job(id, ({ state }) => state === 'running')
  await site.done('job', 'set-speed', id, '0')
  const ended = await site.job(id, ({ endedMs }) => endedMs !== undefined)
  assert.equal(ended.error, undefined)
  return ended
}

async function checkDisk({ site, content }: Setting): Promise<void> {
  const guest = await site.guest('vm1')
  const found = Buffer.alloc(16 * MIB)
  await guest.read(0, found.length, found, 0)
  await guest.close()
  assert.ok(found.equals(content), 'the disk holds what was written')
}

/** Another backup is an incremental, and restores to what the disk holds. */
async function checkBackup({ site, content }: Setting): Promise<void> {
  const said = await site.done('backup', 'vm1', '--repo', site.repository)
  assert.match(said, /incremental/)
  await site.done('restore', said.split('\n')[0] ?? '', '--repo', site.repository, '--to', site.path('r.raw'))
  assert.ok(fs.readFileSync(site.path('r.raw')).equals(content), 'the restored image equals the disk')
}

for (const kind of ['commit', 'stream', 'mirror', 'backup'] as const) {
  test(`Ctrl-C of a ${kind} that is followed leaves the job running, and says so`, async (t) => {
    const setting = await setUp(t)
    const { site } = setting
    const follower = site.begin(...WORK[kind](site))
    const { id } = await underWay(site)
    follower.child.kill('SIGINT')
    const { signal, stderr } = await follower.ended
    assert.equal(signal, 'SIGINT')
    assert.equal(
      stderr,
      `varve: job ${id} goes on without this command: varve job show ${id}, varve job cancel ${id}\n`,
    )
    await endsWell(site, id)
    await checkDisk(setting)
    await checkBackup(setting)
  })

  test(`a daemon that is told to stop in the middle of a ${kind} stops within seconds, and the job goes on at the next start`, async (t) => {
    const setting = await setUp(t)
    const { site } = setting
    const follower = site.begin(...WORK[kind](site))
    const { id, done } = await underWay(site)
    const before = performance.now()
    await site.daemon.stop()
    assert.ok(performance.now() - before < STOP_MS)
    assert.match(site.log(), /varve ended cleanly/)
    checkRefusal([kind], await follower.ended, STATUS.failed, new RegExp(`job ${id} .*goes on when it starts again`))
    await site.daemon.start()
    const ended = await endsWell(site, id)
    if (kind !== 'backup') assert.ok(ended.resumedAt > 0, `the ${kind} had done ${done} and went on from nothing`)
    await checkDisk(setting)
    await checkBackup(setting)
  })

  test(`a daemon that is killed in the middle of a ${kind} tells the follower that the job goes on, and it does`, async (t) => {
    const setting = await setUp(t)
    const { site } = setting
    const follower = site.begin(...WORK[kind](site))
    const { id } = await underWay(site)
    await site.daemon.kill()
    checkRefusal([kind], await follower.ended, STATUS.failed, new RegExp(`job ${id} .*goes on when it starts again`))
    await site.daemon.start()
    await endsWell(site, id)
    await checkDisk(setting)
    await checkBackup(setting)
  })
}

test('a job that was paused by its user stays paused over a restart, and keeps the speed that it was given', async (t) => {
  const setting = await setUp(t)
  const { site } = setting
  const { id } = JSON.parse(await site.done(...WORK.commit(site), '--no-wait', '--json')) as { id: string }
  await site.job(id, ({ done }) => done > 0)
  await site.done('job', 'set-speed', id, '3M')
  await site.done('job', 'pause', id)
  await site.daemon.stop()
  await site.daemon.start()
  const paused = await site.job(id, ({ state }) => state === 'paused')
  assert.equal(paused.speed, 3 * MIB)
  await site.done('job', 'resume', id)
  await endsWell(site, id)
  await checkDisk(setting)
})

test('a stop while one backup runs and another waits for it begins neither anew, and takes no longer', async (t) => {
  const setting = await setUp(t)
  const { site } = setting
  const running = site.begin(...WORK.backup(site))
  const { id } = await underWay(site)
  const waiting = site.begin(...WORK.backup(site))
  await new Promise((resolve) => setTimeout(resolve, 1500))
  const before = performance.now()
  await site.daemon.stop()
  assert.ok(performance.now() - before < STOP_MS)
  assert.match(site.log(), /varve ended cleanly/)
  assert.equal((await running.ended).status, STATUS.failed)
  checkRefusal(['backup'], await waiting.ended, STATUS.failed, /the daemon at/)
  await site.daemon.start()
  await endsWell(site, id)
  assert.equal((await site.daemon.api.call('listJobs', {}, {})).filter(({ kind }) => kind === 'backup').length, 2)
  await checkDisk(setting)
  await checkBackup(setting)
})

test('a backup that waits for another is a job, which can be cancelled', async (t) => {
  const setting = await setUp(t)
  const { site } = setting
  const first = site.begin(...WORK.backup(site))
  const { id } = await underWay(site)
  const second = site.begin(...WORK.backup(site))
  const waiting = await site.running(2)
  const queued = waiting.find((job) => job.id !== id)
  assert.equal(queued?.state, 'created')
  await site.refuses(
    ['job', 'pause', queued?.id ?? ''],
    STATUS.busy,
    /is created: pause cannot be said now; what can: cancel/,
  )
  await site.done('job', 'cancel', queued?.id ?? '')
  await endsWell(site, id)
  assert.equal((await first.ended).status, STATUS.done)
  checkRefusal(['backup'], await second.ended, STATUS.failed, /was cancelled/)
  await checkBackup(setting)
})

test('a backup that a restart cannot let go on ends as a failed job, and the next one is incremental', async (t) => {
  const setting = await setUp(t)
  const { site } = setting
  const { id } = JSON.parse(await site.done(...WORK.backup(site), '--no-wait', '--json')) as { id: string }
  await site.daemon.stop()
  fs.renameSync(site.repository, `${site.repository}.away`)
  await site.daemon.start()
  const ended = await site.job(id, ({ endedMs }) => endedMs !== undefined)
  assert.equal(ended.error?.kind, 'not-found')
  assert.match(await site.done('job', 'list'), new RegExp(`${id} .*is no repository`))
  fs.renameSync(`${site.repository}.away`, site.repository)
  await checkBackup(setting)
})

test('a backup of disks in two threads that a stop of the daemon breaks goes on from what the repository has of each', async (t) => {
  const setting = await setUp(t)
  const { site, content } = setting
  await site.disk('vm2', '16M', 'raw')
  const guest = await site.guest('vm2')
  for (let at = 0; at < 16; at++) await guest.write(at * MIB, MIB, content, at * MIB, 0)
  await guest.close()
  const backup = ['backup', 'vm1', '--with', 'vm2', '--repo', site.repository, '--speed', '4M']
  const { id } = JSON.parse(await site.done(...backup, '--no-wait', '--json')) as { id: string }
  // The first disk has 8 MiB to copy.
  await site.job(id, ({ done }) => done > 10 * MIB)
  await site.daemon.stop()
  await site.daemon.start()
  const { details } = await endsWell(site, id)
  for (const { reason } of details['disks'] as { reason: string }[]) assert.match(reason, /goes on where \S+ broke off/)
  assert.ok(Number(details['readBytes']) <= 15 * MIB, 'what was copied is not read again')
  for (const disk of ['vm1', 'vm2']) {
    const image = site.path(`${disk}.restored`)
    await site.done('restore', String(details['backup']), '--disk', disk, '--repo', site.repository, '--to', image)
    assert.ok(fs.readFileSync(image).equals(content), `${disk} is restored`)
  }
})
