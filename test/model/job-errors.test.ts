// What an error of the storage means to a job, by its policy, on whole engines on a simulated host: it ends and all is as before, or it
// pauses and goes on when it is resumed. Nothing is lost either way, also when it was a flush that failed. And what else waits for the
// user: to be finalized, and to be dismissed.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { JOBS_KEPT } from '../../src/base/limits.ts'
import { Random } from '../../src/base/random.ts'
import type { BlockDevice } from '../../src/block/device.ts'
import { BlockError, type ErrorKind, isBlockError } from '../../src/block/error.ts'
import type { JobState, JobStatus } from '../../src/job/job.ts'
import type { ErrorPolicy } from '../../src/job/terms.ts'
import type { HostOperation } from '../../src/host/simulated.ts'
import { Lab, LAB_REPOSITORY, readWhole } from '../support/lab.ts'

const SIZE = 1024 * 1024

interface Trial {
  readonly merge: 'commit' | 'stream'
  readonly policy: ErrorPolicy | undefined
  readonly kind: ErrorKind
  readonly at: HostOperation['kind']
  readonly pauses: boolean
}

// A failed sync of the active layer is the guest's affair too: that image refuses all flushes from then on.
const PLACES = [
  ['commit', 'write'],
  ['commit', 'sync'],
  ['stream', 'write'],
] as const

const TRIALS: readonly Trial[] = PLACES.flatMap(([merge, at]): Trial[] => [
  { merge, at, policy: undefined, kind: 'no-space', pauses: true },
  { merge, at, policy: undefined, kind: 'io', pauses: false },
  { merge, at, policy: 'report', kind: 'no-space', pauses: false },
  { merge, at, policy: 'stop', kind: 'io', pauses: true },
])

for (const { merge, policy, kind, at, pauses } of TRIALS) {
  test(`${merge}, policy ${policy ?? 'not said'}, ${kind} at a ${at}: it ${pauses ? 'pauses and goes on' : 'ends'}`, async () => {
    const lab = await Lab.create()
    const { engine } = lab
    await engine.createDisk('vm', '/images/vm.qcow2', 'qcow2', SIZE)
    const random = new Random(1)
    await lab.guest('vm').write(0, SIZE, random.fill(Buffer.alloc(SIZE)), 0, 0)
    await engine.createSnapshot('vm', 's')
    await lab.guest('vm').write(0, SIZE / 2, random.fill(Buffer.alloc(SIZE / 2)), 0, 0)
    await lab.guest('vm').flush()
    const content = await readWhole(lab.guest('vm'))
    const target = merge === 'commit' ? '/images/vm.qcow2' : '/images/vm.varve-1.qcow2'
    let after = 1
    lab.host.beforeOperation = (operation) => {
      if (operation.path !== target || operation.kind !== at) return
      if (at === 'write' && after-- > 0) return
      lab.host.beforeOperation = undefined
      throw new BlockError(kind, 'the storage says so')
    }
    const { id } = await engine[merge]('vm', undefined, undefined, { onError: policy })
    const waiting = (): JobStatus => engine.showJob(id)
    while (waiting().endedMs === undefined && waiting().state !== 'paused')
      await new Promise((resolve) => setImmediate(resolve))
    assert.equal(waiting().error?.kind, kind)
    assert.equal(waiting().state, pauses ? 'paused' : 'concluded')
    assert.ok((await readWhole(lab.guest('vm'))).equals(content))
    if (pauses) {
      await engine.sayToJob(id, 'resume')
      assert.equal((await engine.jobEnded(id)).error, undefined)
    }
    assert.equal(engine.showDisk('vm').layers.length, pauses ? 1 : 2)
    assert.ok((await readWhole(lab.guest('vm'))).equals(content))
    // What was flushed survives the host, wherever it lies now.
    const fork = lab.fork('none')
    await fork.start()
    assert.ok((await readWhole(fork.guest('vm'))).equals(content))
    await fork.stop()
    await lab.stop()
  })
}

test('an ended job is dismissed, a running one is not, and the history has it all the same', async () => {
  const lab = await Lab.create()
  const { engine } = lab
  await engine.createDisk('vm', '/images/vm.qcow2', 'qcow2', SIZE)
  await engine.createSnapshot('vm', 's')
  await lab.guest('vm').write(0, SIZE, Buffer.alloc(SIZE, 1), 0, 0)
  const { id } = await engine.commit('vm', undefined, undefined, { speed: 100_000, dismiss: 'manual' })
  await assert.rejects(
    engine.dismissJob(id),
    (error) => isBlockError(error, 'busy') && /varve job cancel/.test(error.message),
  )
  await engine.setJobSpeed(id, 0)
  assert.equal((await engine.jobEnded(id)).dismissed, false)
  for (let again = 0; again < 2; again++) {
    await engine.dismissJob(id)
    assert.deepEqual(
      engine.listJobs().map(({ dismissed }) => dismissed),
      [true],
    )
  }
  await assert.rejects(engine.dismissJob('commit-0'), (error) => isBlockError(error, 'not-found'))
  await lab.stop()
})

test('the history is bounded, and what was dismissed leaves it first', async () => {
  const lab = await Lab.create()
  const { engine } = lab
  await engine.createDisk('vm', '/images/vm.qcow2', 'qcow2', 64 * 1024)
  const kept: string[] = []
  for (let round = 0; round < JOBS_KEPT + 20; round++) {
    await engine.createSnapshot('vm', 's')
    const dismiss = round < 10 ? 'manual' : 'auto'
    const { id } = await engine.commit('vm', undefined, undefined, { dismiss })
    await engine.jobEnded(id)
    if (dismiss === 'manual') kept.push(id)
  }
  const jobs = engine.listJobs()
  assert.equal(jobs.length, JOBS_KEPT)
  assert.deepEqual(
    jobs
      .filter(({ dismissed }) => !dismissed)
      .map(({ id }) => id)
      .toReversed(),
    kept,
  )
  await lab.stop()
})

/** A disk with a snapshot below, and what it holds. */
async function setUp(): Promise<{ readonly lab: Lab; readonly content: Buffer }> {
  const lab = await Lab.create()
  await lab.engine.createDisk('vm', '/images/vm.qcow2', 'qcow2', SIZE)
  const random = new Random(2)
  await lab.guest('vm').write(0, SIZE, random.fill(Buffer.alloc(SIZE)), 0, 0)
  await lab.engine.createSnapshot('vm', 's')
  await lab.guest('vm').write(0, SIZE / 2, random.fill(Buffer.alloc(SIZE / 2)), 0, 0)
  await lab.guest('vm').flush()
  return { lab, content: await readWhole(lab.guest('vm')) }
}

async function reaches(lab: Lab, id: string, state: JobState): Promise<JobStatus> {
  for (;;) {
    const status = lab.engine.showJob(id)
    if (status.state === state) return status
    assert.equal(status.endedMs, undefined, `job ${id}: ${status.error?.message}`)
    await new Promise((resolve) => setImmediate(resolve))
  }
}

for (const merge of ['commit', 'stream'] as const) {
  test(`a ${merge} that is finalized by hand waits with nothing changed, over a restart too, and holds what the guest wrote since`, async () => {
    const { lab, content } = await setUp()
    const { id } = await lab.engine[merge]('vm', undefined, undefined, { finalize: 'manual' })
    await reaches(lab, id, 'pending')
    assert.equal(lab.engine.showDisk('vm').layers.length, 2)
    await lab.stop()
    await lab.start()
    await reaches(lab, id, 'pending')
    await lab.guest('vm').write(4096, 4096, Buffer.alloc(4096, 7), 0, 0)
    content.fill(7, 4096, 8192)
    await lab.engine.sayToJob(id, 'finalize')
    assert.equal((await lab.engine.jobEnded(id)).error, undefined)
    assert.equal(lab.engine.showDisk('vm').layers.length, 1)
    assert.ok((await readWhole(lab.guest('vm'))).equals(content))
    await lab.stop()
  })

  test(`a ${merge} that is pending is cancelled, and all is as before`, async () => {
    const { lab, content } = await setUp()
    const { id } = await lab.engine[merge]('vm', undefined, undefined, { finalize: 'manual' })
    await reaches(lab, id, 'pending')
    await lab.engine.sayToJob(id, 'cancel')
    assert.equal((await lab.engine.jobEnded(id)).error?.kind, 'cancelled')
    assert.equal(lab.engine.showDisk('vm').layers.length, 2)
    assert.ok((await readWhole(lab.guest('vm'))).equals(content))
    await lab.stop()
  })
}

test('a backup that is finalized by hand is not there before, and then is of its own moment', async () => {
  const { lab, content } = await setUp()
  const request = { disks: ['vm'], repository: LAB_REPOSITORY, full: false, finalize: 'manual' } as const
  const { id } = await lab.engine.backup(request)
  await reaches(lab, id, 'pending')
  await lab.guest('vm').write(0, 4096, Buffer.alloc(4096, 9), 0, 0)
  const repository = await lab.repository()
  assert.deepEqual(await repository.backups(), [])
  await lab.engine.sayToJob(id, 'finalize')
  const { details } = await lab.engine.jobEnded(id)
  const backup = await repository.openBackup(String(details['backup']))
  assert.ok((await readWhole(backup.disks[0]?.device as BlockDevice)).equals(content))
  await backup.close()
  await repository.close()
  await lab.stop()
})

test('a backup whose repository is full waits for room, and is whole after; with report it ends', async () => {
  for (const onError of ['enospc', 'stop', 'report'] as const) {
    const { lab, content } = await setUp()
    let isFull = true
    lab.host.beforeOperation = ({ path, kind }) => {
      if (isFull && kind === 'write' && path.includes('/packs/')) throw new BlockError('no-space', 'no space left')
    }
    const { id } = await lab.engine.backup({ disks: ['vm'], repository: LAB_REPOSITORY, full: false, onError })
    if (onError === 'report') {
      assert.equal((await lab.engine.jobEnded(id)).error?.kind, 'no-space')
      await lab.stop()
      continue
    }
    assert.equal((await reaches(lab, id, 'paused')).error?.kind, 'no-space')
    await lab.guest('vm').write(0, 4096, Buffer.alloc(4096, 9), 0, 0)
    isFull = false
    await lab.engine.sayToJob(id, 'resume')
    const { error, details } = await lab.engine.jobEnded(id)
    assert.equal(error, undefined)
    const repository = await lab.repository()
    const backup = await repository.openBackup(String(details['backup']))
    assert.ok((await readWhole(backup.disks[0]?.device as BlockDevice)).equals(content))
    await backup.close()
    await repository.close()
    await lab.stop()
  }
})

test('a mirror that ignores errors copies all else first, and at last what failed: nothing is left out', async () => {
  const { lab, content } = await setUp()
  const target = '/images/copy.raw'
  let failures = 2
  let written = 0
  const before: number[] = []
  lab.host.beforeOperation = ({ path, kind }) => {
    if (path !== target) return
    if (kind === 'open') before.push(written)
    if (kind === 'open') written = 0
    if (kind === 'write' && written++ === 0 && failures-- > 0) throw new BlockError('io', 'the storage says so')
  }
  const { id } = await lab.engine.mirror('vm', {
    target,
    format: 'raw',
    sync: 'full',
    mode: 'background',
    existing: false,
    finish: 'copy',
    onError: 'ignore',
  })
  const { error, details } = await lab.engine.jobEnded(id)
  assert.equal(error, undefined)
  assert.equal(details['ignored'], 2)
  assert.ok(
    (before[1] ?? 0) > 10,
    `${before.join(', ')} writes between openings: the others do not wait for what failed`,
  )
  const copy = await lab.host.open(target, {})
  const found = Buffer.alloc(SIZE)
  await copy.read(0, SIZE, found, 0)
  await copy.close()
  assert.ok(found.equals(content))
  await lab.stop()
})

test('a policy that would pass over something is refused, and so is what a kind of job cannot wait for', async () => {
  const { lab } = await setUp()
  const refuses = (work: Promise<unknown>, says: RegExp): Promise<void> =>
    assert.rejects(work, (error) => isBlockError(error, 'invalid-argument') && says.test(error.message))
  const { engine } = lab
  for (const merge of ['commit', 'stream'] as const)
    await refuses(engine[merge]('vm', undefined, undefined, { onError: 'ignore' }), /nothing that it could pass over/)
  const mirror = { target: '/images/x.raw', format: 'raw', sync: 'full', mode: 'auto', existing: false } as const
  await refuses(engine.mirror('vm', { ...mirror, finalize: 'manual' }), /waits for varve job complete by itself/)
  await refuses(engine.commit('vm', undefined, undefined, { guestLatency: -1 }), /is no latency/)
  assert.deepEqual(engine.listJobs(), [])
  assert.equal(await lab.host.status('/images/x.raw'), undefined)
  await lab.stop()
})
