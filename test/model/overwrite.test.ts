// Restores onto a disk on whole engines on a simulated host: it becomes what it was, by what differs alone, and nobody uses it meanwhile. What it
// was before stays as a snapshot, to which a cancel goes back. Crashes and more restores onto it end the same.

import assert from 'node:assert/strict'
import { type TestContext, test } from 'node:test'
import { Random, seedOfRun } from '../../src/base/random.ts'
import { isBlockError } from '../../src/block/error.ts'
import type { OverwriteRequest } from '../../src/engine/overwrites.ts'
import type { JobStatus } from '../../src/job/job.ts'
import { noise } from '../support/backups.ts'
import { Lab, LAB_REPOSITORY, readWhole } from '../support/lab.ts'

const GRANULE = 4096
const SIZE = 256 * GRANULE

class Trial {
  lab: Lab
  readonly random: Random
  content = Buffer.alloc(SIZE)
  /** What each backup holds, by its id, oldest first. */
  readonly backups = new Map<string, Buffer>()

  constructor(lab: Lab, random: Random) {
    this.lab = lab
    this.random = random
  }

  async write(count: number): Promise<void> {
    const { random } = this
    for (let i = 0; i < count; i++) {
      const offset = random.below(SIZE / GRANULE) * GRANULE
      const length = Math.min(SIZE - offset, (1 + random.below(4)) * GRANULE)
      const data = random.chance(0.2) ? Buffer.alloc(length) : noise(random, length)
      await this.lab.guest('vm').write(offset, length, data, 0, 0)
      data.copy(this.content, offset)
    }
  }

  async backUp(): Promise<JobStatus> {
    const { id } = await this.lab.engine.backup({ disks: ['vm'], repository: LAB_REPOSITORY, full: false })
    const ended = await this.lab.engine.jobEnded(id)
    assert.equal(ended.error, undefined)
    this.backups.set(String(ended.details['backup']), Buffer.from(this.content))
    return ended
  }

  begin(backup: string, more: Partial<OverwriteRequest> = {}): Promise<JobStatus> {
    return this.lab.engine.restoreOnto('vm', { repository: LAB_REPOSITORY, backup, keep: 'before', ...more })
  }

  /** The whole of it; returns the job as it ended. */
  async restore(backup: string, more: Partial<OverwriteRequest> = {}): Promise<JobStatus> {
    const ended = await this.lab.engine.jobEnded((await this.begin(backup, more)).id)
    assert.equal(ended.error, undefined)
    this.content = Buffer.from(this.backups.get(backup) as Buffer)
    return ended
  }

  async check(note: string): Promise<void> {
    assert.ok((await readWhole(this.lab.guest('vm'))).equals(this.content), note)
  }
}

/** A disk with three backups, and writes since the last. */
async function setUp(t: TestContext): Promise<{ trial: Trial; ids: string[] }> {
  const random = new Random(seedOfRun())
  t.diagnostic(`VARVE_SEED=${random.seed}`)
  const trial = new Trial(await Lab.create(), random)
  await trial.lab.engine.createDisk('vm', '/images/vm.qcow2', 'qcow2', SIZE)
  await trial.write(60)
  for (let backup = 0; backup < 3; backup++) {
    await trial.backUp()
    await trial.write(4)
  }
  return { trial, ids: [...trial.backups.keys()] }
}

function changedBetween(one: Buffer, two: Buffer): number {
  let bytes = 0
  for (let at = 0; at < SIZE; at += GRANULE)
    if (one.compare(two, at, at + GRANULE, at, at + GRANULE) !== 0) bytes += GRANULE
  return bytes
}

test('a disk becomes what it was in any backup, by its bitmap and the maps, and the next backup is incremental', async (t) => {
  const { trial, ids } = await setUp(t)
  for (const [index, id] of [ids[2], ids[0], ids[1]].entries()) {
    const differs = changedBetween(trial.content, trial.backups.get(id as string) as Buffer)
    const { details } = await trial.restore(id as string, { keep: `before-${index}` })
    await trial.check(`restore ${index}`)
    assert.equal(details['changedBytes'], differs)
    assert.ok(Number(details['comparedBytes']) <= SIZE / 3, `compared ${String(details['comparedBytes'])}`)
    assert.match(String(details['reason']), /^what changed since/)
    await trial.write(2)
  }
  const [{ kind }] = (await trial.backUp()).details['disks'] as [{ kind: string }]
  assert.equal(kind, 'incremental')
  const repository = await trial.lab.repository()
  const reader = await repository.openBackup([...trial.backups.keys()].at(-1) as string)
  assert.ok((await readWhole(reader.disks[0]?.device as never)).equals(trial.content))
  await repository.close()
})

test('what it was stays as a snapshot unless it is discarded', async (t) => {
  const { trial, ids } = await setUp(t)
  const present = Buffer.from(trial.content)
  await trial.restore(ids[0] as string)
  await trial.lab.engine.revert('vm', 'before', 'after')
  trial.content = present
  await trial.check('the present state is back')
  await trial.restore(ids[1] as string, { keep: undefined })
  await trial.check('without a snapshot')
  assert.deepEqual(
    trial.lab.engine.listSnapshots('vm').map(({ name }) => name),
    ['before', 'after'],
  )
})

test('a disk that nothing is known of is compared as a whole, and only what differs is written', async (t) => {
  const { trial, ids } = await setUp(t)
  const repository = await trial.lab.repository()
  const bitmap = `backup:${repository.id}`
  await repository.close()
  await trial.lab.disk('vm').log.edit([{ kind: 'remove', name: bitmap }])
  const differs = changedBetween(trial.content, trial.backups.get(ids[0] as string) as Buffer)
  const { details } = await trial.restore(ids[0] as string)
  await trial.check('compared')
  assert.equal(details['changedBytes'], differs)
  assert.ok(Number(details['fetchedBytes']) <= Number(details['comparedBytes']))
  assert.match(String(details['reason']), /^all of it is compared/)
})

test('nobody may use the disk meanwhile, and a cancel brings back what it was', async (t) => {
  const { trial, ids } = await setUp(t)
  const { lab } = trial
  const { id } = await trial.begin(ids[0] as string, { speed: 1 })
  assert.equal(lab.engine.showDisk('vm').uri, undefined)
  await assert.rejects(lab.engine.createSnapshot('vm', 'monday'), (error) => isBlockError(error, 'busy'))
  const backup = lab.engine.backup({ disks: ['vm'], repository: LAB_REPOSITORY, full: false })
  await assert.rejects(backup, (error) => isBlockError(error, 'busy'))
  await lab.engine.sayToJob(id, 'cancel')
  assert.equal((await lab.engine.jobEnded(id)).error?.kind, 'cancelled')
  assert.ok(lab.engine.showDisk('vm').uri !== undefined)
  await trial.check('after the cancel')
})

test('one that is cancelled without a snapshot stays withdrawn until another one is whole', async (t) => {
  const { trial, ids } = await setUp(t)
  const { lab } = trial
  const { id } = await trial.begin(ids[0] as string, { speed: 1, keep: undefined })
  await lab.engine.sayToJob(id, 'cancel')
  await lab.engine.jobEnded(id)
  for (const restart of [false, true]) {
    if (restart) {
      await lab.stop()
      await lab.start()
    }
    assert.equal(lab.engine.showDisk('vm').uri, undefined)
    assert.equal(lab.engine.showDisk('vm').restoring?.backup, ids[0])
  }
  await trial.restore(ids[1] as string)
  await trial.check('after another one')
  assert.deepEqual((await lab.host.list(`${LAB_REPOSITORY}/sessions`)).length, 0)
})

test('a backup of a larger disk is refused, and of a smaller one the rest becomes zeros', async (t) => {
  const { trial, ids } = await setUp(t)
  const { lab } = trial
  await lab.engine.resizeDisk('vm', SIZE + 5 * GRANULE)
  await lab.guest('vm').write(SIZE, GRANULE, Buffer.alloc(GRANULE, 1), 0, 0)
  await trial.restore(ids[2] as string)
  const found = await readWhole(lab.guest('vm'))
  assert.ok(found.subarray(0, SIZE).equals(trial.content) && found.subarray(SIZE).every((byte) => byte === 0))
  await lab.engine.createDisk('small', '/images/small.qcow2', 'qcow2', GRANULE)
  const request = { repository: LAB_REPOSITORY, backup: ids[0] as string }
  await assert.rejects(lab.engine.restoreOnto('small', request), /varve disk resize makes it larger/)
  assert.ok(lab.engine.showDisk('small').uri !== undefined)
})

test('a restore onto a disk goes on after a crash at any moment', async (t) => {
  const { trial, ids } = await setUp(t)
  const { lab, random } = trial
  const target = ids[0] as string
  const before = Buffer.from(trial.content)
  const crashes: { readonly crashed: Lab; readonly note: string; readonly isBegun: boolean }[] = []
  let isBegun = false
  await lab.guest('vm').flush()
  lab.host.beforeOperation = ({ kind, number }) => {
    if (kind === 'read' || kind === 'open') return
    const keep = [undefined, 'none', random] as const
    const crashed = lab.fork(keep[number % 3])
    crashes.push({ crashed, note: `VARVE_SEED=${random.seed}: crash ${number}`, isBegun })
  }
  const { id } = await trial.begin(target)
  isBegun = true
  await lab.engine.jobEnded(id)
  lab.host.beforeOperation = undefined
  let resumed = 0
  for (const { crashed, note, isBegun: wasBegun } of crashes) {
    await crashed.start()
    if (crashed.engine.listJobs().some(({ kind, endedMs }) => kind === 'overwrite' && endedMs === undefined)) resumed++
    await crashed.jobsEnd()
    const found = await readWhole(crashed.guest('vm'))
    const isNew = found.equals(trial.backups.get(target) as Buffer)
    assert.ok(isNew || (!wasBegun && found.equals(before)), note)
    assert.equal(crashed.disk('vm').log.bitmaps.size, 1, note)
    await crashed.stop()
  }
  t.diagnostic(`${crashes.length} crashes, the restore went on after ${resumed}`)
  assert.ok(resumed > 5 && resumed < crashes.length)
})
