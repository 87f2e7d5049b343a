// Live restores on whole engines on a simulated host: the disk is the backup at once, whoever writes or reads; at the end it needs no
// backup, the next one is incremental, and nothing is held. What is forgotten, pruned or away meanwhile harms nobody.

import assert from 'node:assert/strict'
import { type TestContext, test } from 'node:test'
import { Random, seedOfRun } from '../../src/base/random.ts'
import { BlockError, isBlockError } from '../../src/block/error.ts'
import type { RestoreRequest } from '../../src/engine/restores.ts'
import { openQcow2 } from '../../src/format/qcow2/image.ts'
import type { JobStatus } from '../../src/job/job.ts'
import { backUp, noise } from '../support/backups.ts'
import { Lab, LAB_REPOSITORY, readWhole } from '../support/lab.ts'

const CLUSTER = 65_536
const SIZE = 16 * CLUSTER + 1536
const IMAGE = '/images/vm.qcow2'

interface Trial {
  readonly lab: Lab
  readonly random: Random
  /** What the disk must hold. */
  readonly content: Buffer
  readonly backup: string
}

/** A backup of one disk, "sda", half of it data. */
async function setUp(t: TestContext, scheduler = false): Promise<Trial> {
  const random = new Random(seedOfRun())
  t.diagnostic(`VARVE_SEED=${random.seed}`)
  const lab = await Lab.create(scheduler ? new Random(random.next()) : undefined)
  const content = Buffer.alloc(SIZE)
  for (let cluster = 0; cluster * CLUSTER < SIZE; cluster++) {
    if (cluster % 2 === 0) noise(random, Math.min(CLUSTER, SIZE - cluster * CLUSTER)).copy(content, cluster * CLUSTER)
  }
  const repository = await lab.repository()
  const { id } = await backUp(repository, content)
  await repository.close()
  return { lab, random, content, backup: id }
}

function begin({ lab, backup }: Trial, more: Partial<RestoreRequest> = {}): Promise<JobStatus> {
  return lab.engine.restore({ name: 'vm', repository: LAB_REPOSITORY, backup, image: IMAGE, ...more })
}

/** The same, held back by its speed until it is let go. */
async function beginPaused(trial: Trial, more: Partial<RestoreRequest> = {}): Promise<string> {
  const { id } = await begin(trial, { ...more, speed: 1 })
  await trial.lab.engine.sayToJob(id, 'pause')
  return id
}

async function goOn({ lab }: Trial, id: string): Promise<void> {
  await lab.engine.setJobSpeed(id, 0)
  await lab.engine.sayToJob(id, 'resume')
  assert.equal((await lab.engine.jobEnded(id)).error, undefined)
}

async function write({ lab, random, content }: Trial, count: number): Promise<void> {
  for (let i = 0; i < count; i++) {
    const first = random.below(SIZE / 512)
    const length = Math.min(1 + random.below(200), SIZE / 512 - first) * 512
    const data = noise(random, length)
    if (random.chance(0.2)) {
      await lab.guest('vm').zero(first * 512, length, 0)
      content.fill(0, first * 512, first * 512 + length)
    } else {
      await lab.guest('vm').write(first * 512, length, data, 0, 0)
      content.set(data, first * 512)
    }
  }
}

async function check({ lab, content }: Trial, note: string): Promise<void> {
  assert.ok((await readWhole(lab.guest('vm'))).equals(content), note)
}

/** Sessions in the repository, besides their beats. */
async function holds(lab: Lab): Promise<number> {
  return (await lab.host.list(`${LAB_REPOSITORY}/sessions`)).filter((name) => !name.includes('.')).length
}

/** All of the repository leaves its place, or comes back. */
async function moveRepository(lab: Lab, from: string, to: string): Promise<void> {
  for (const folder of ['', 'packs', 'index', 'backups', 'sessions']) {
    await lab.host.makeFolder(`${to}/${folder}`)
    for (const name of await lab.host.list(`${from}/${folder}`)) {
      if ((await lab.host.status(`${from}/${folder}/${name}`))?.kind === 'file')
        await lab.host.rename(`${from}/${folder}/${name}`, `${to}/${folder}/${name}`)
    }
  }
}

for (const scheduler of [false, true]) {
  test(`a disk is its backup at once, while it is written, and at the end without it; ${scheduler ? 'late' : 'prompt'} host`, async (t) => {
    const trial = await setUp(t, scheduler)
    const { lab, random, content } = trial
    const { id } = await begin(trial)
    await check(trial, 'at once')
    await write(trial, 40)
    const into = Buffer.alloc(5000)
    for (let read = 0; read < 20; read++) {
      const offset = random.below(SIZE - into.length)
      await lab.guest('vm').read(offset, into.length, into, 0)
      assert.ok(into.equals(content.subarray(offset, offset + into.length)), `VARVE_SEED=${random.seed}: at ${offset}`)
    }
    assert.equal((await lab.engine.jobEnded(id)).error, undefined)
    await check(trial, 'after the job')
    assert.deepEqual(lab.engine.showDisk('vm').layers, [{ path: IMAGE, format: 'qcow2', made: true }])
    assert.equal(lab.engine.showDisk('vm').restoring, undefined)
    assert.equal(await holds(lab), 0)
    assert.deepEqual(lab.catalog.list('garbage'), [])
    await lab.stop()
    const image = await openQcow2(lab.host, IMAGE, { name: 'vm' })
    assert.equal(image.backingReference, undefined)
    assert.ok((await readWhole(image)).equals(content), 'the image alone')
    await image.close()
    await lab.start()
    await check(trial, 'after a restart')
  })
}

test('the next backup is incremental against the restored one, although the disk has another name there', async (t) => {
  const trial = await setUp(t)
  const { lab, content, backup } = trial
  const id = await beginPaused(trial)
  await write(trial, 5)
  // Also while the rest is missing.
  for (const moment of ['while it is restored', 'after']) {
    const job = await lab.engine.backup({ disks: ['vm'], repository: LAB_REPOSITORY, full: false })
    const ended = await lab.engine.jobEnded(job.id)
    assert.equal(ended.error, undefined)
    const [{ kind, reason }] = ended.details['disks'] as [{ kind: string; reason: string }]
    assert.equal(kind, 'incremental', `${moment}: ${reason}`)
    if (moment !== 'after') assert.equal(reason, `changes since ${backup}`)
    const repository = await lab.repository()
    const reader = await repository.openBackup(String(ended.details['backup']))
    assert.ok((await readWhole(reader.disks[0]?.device as never)).equals(content), moment)
    await repository.close()
    if (moment !== 'after') await goOn(trial, id)
    await write(trial, 5)
  }
})

test('a backup that is forgotten and pruned while it is restored stays until the disk needs it no more', async (t) => {
  const trial = await setUp(t)
  const { lab, backup } = trial
  const id = await beginPaused(trial)
  const repository = await lab.repository()
  await repository.forget(backup)
  for (let pruning = 0; pruning < 2; pruning++) assert.equal((await repository.prune()).removedPacks, 0)
  await lab.stop()
  await repository.prune()
  await lab.start()
  await check(trial, 'after a prune while the daemon did not run')
  await goOn(trial, id)
  await check(trial, 'after the job')
  assert.ok((await repository.prune()).removedPacks > 0)
  await repository.close()
})

test('guests wait for a repository that is away, and the restore goes on when it is back', async (t) => {
  const trial = await setUp(t)
  const { lab } = trial
  const id = await beginPaused(trial)
  await moveRepository(lab, LAB_REPOSITORY, '/elsewhere')
  const read = readWhole(lab.guest('vm'))
  while (lab.engine.showDisk('vm').restoring?.away === undefined) await new Promise(setImmediate)
  await moveRepository(lab, '/elsewhere', LAB_REPOSITORY)
  assert.ok((await read).equals(trial.content))
  assert.equal(lab.engine.showDisk('vm').restoring?.away, undefined)
  await goOn(trial, id)
  await check(trial, 'after the job')
})

test('guests are told of a repository that is away when that is asked for, and a daemon starts without it', async (t) => {
  const trial = await setUp(t)
  const { lab } = trial
  const id = await beginPaused(trial, { whenAway: 'report' })
  await moveRepository(lab, LAB_REPOSITORY, '/elsewhere')
  await lab.stop()
  await lab.start()
  await assert.rejects(readWhole(lab.guest('vm')), (error) => isBlockError(error, 'io'))
  await moveRepository(lab, '/elsewhere', LAB_REPOSITORY)
  await check(trial, 'when it is back')
  await goOn(trial, id)
})

test('a daemon stops while guests wait for a repository', async (t) => {
  const trial = await setUp(t)
  const { lab } = trial
  await beginPaused(trial)
  await moveRepository(lab, LAB_REPOSITORY, '/elsewhere')
  const read = readWhole(lab.guest('vm')).catch((error: unknown) => error)
  while (lab.engine.showDisk('vm').restoring?.away === undefined) await new Promise(setImmediate)
  await lab.stop()
  const failure = await read
  assert.ok(failure instanceof BlockError && failure.kind === 'closed', String(failure))
  await moveRepository(lab, '/elsewhere', LAB_REPOSITORY)
  await lab.start()
  await check(trial, 'after the restart')
})

test('a cancelled restore leaves the disk over its backup, a stream brings the rest, and a removal leaves nothing', async (t) => {
  const trial = await setUp(t)
  const { lab } = trial
  await lab.engine.sayToJob(await beginPaused(trial), 'cancel')
  await lab.jobsEnd().catch(() => undefined)
  await write(trial, 5)
  await check(trial, 'after the cancel')
  await assert.rejects(lab.engine.createSnapshot('vm', 'monday'), /has to wait: the rest of disk vm is in backup/)
  const { id, kind } = await lab.engine.stream('vm')
  assert.equal(kind, 'restore')
  assert.equal((await lab.engine.jobEnded(id)).error, undefined)
  await check(trial, 'after the stream')
  await lab.engine.createSnapshot('vm', 'monday')

  const other = await begin(trial, { name: 'web', image: '/images/web.qcow2', speed: 1 })
  await lab.engine.sayToJob(other.id, 'cancel')
  await lab.engine.jobEnded(other.id)
  await lab.engine.removeDisk('web')
  assert.equal(await lab.host.status('/images/web.qcow2'), undefined)
  assert.equal(await holds(lab), 0)
})

test('a restore that cannot begin leaves nothing behind', async (t) => {
  const trial = await setUp(t)
  const { lab, backup } = trial
  const before = await lab.host.list('/images')
  const refused = async (more: Partial<RestoreRequest>, says: RegExp): Promise<void> => {
    await assert.rejects(begin(trial, more), says)
    assert.deepEqual(await lab.host.list('/images'), before)
    assert.equal(await holds(lab), 0)
    assert.deepEqual(lab.catalog.list('garbage'), [])
    assert.deepEqual(lab.catalog.list('job'), [])
  }
  await refused({ backup: 'yesterday' }, /has no backup yesterday/)
  await refused({ disk: 'sdb' }, /has no disk sdb; it has sda/)
  await refused({ image: 'vm.qcow2' }, /needs an absolute path/)
  await refused({ name: 'a/b' }, /disk name/)
  lab.catalog.beforeCommit = (changes) => {
    if (changes.some((change) => 'put' in change && change.put === 'disk')) throw new BlockError('io', 'no catalog')
  }
  await refused({}, /no catalog/)
  lab.catalog.beforeCommit = undefined
  await begin(trial)
  await assert.rejects(begin(trial, { name: 'web', backup }), /vm.qcow2 is there already/)
  await lab.jobsEnd()
})
