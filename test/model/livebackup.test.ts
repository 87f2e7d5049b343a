// What went wrong in Livebackup, QEMU's first dirty-bitmap backup of 2011, each as a test: a second write over a saved block, a save that
// fails, a client that dies, a tail shorter than a block, several disks that diverge, a backup marked done before it is durable.

import assert from 'node:assert/strict'
import { type TestContext, test } from 'node:test'
import { Random, seedOfRun } from '../../src/base/random.ts'
import type { BlockDevice } from '../../src/block/device.ts'
import type { JobStatus } from '../../src/job/job.ts'
import { Lab, LAB_REPOSITORY, readWhole } from '../support/lab.ts'

const GRANULE = 4096
/** The last granule has 512 bytes. */
const SIZE = 64 * GRANULE + 512

class Trial {
  lab: Lab
  readonly random: Random

  constructor(lab: Lab, random: Random) {
    this.lab = lab
    this.random = random
  }

  static async start(t: TestContext, ...disks: readonly string[]): Promise<Trial> {
    const random = new Random(seedOfRun())
    t.diagnostic(`VARVE_SEED=${random.seed}`)
    const trial = new Trial(await Lab.create(), random)
    for (const name of disks) {
      await trial.lab.engine.createDisk(name, `/images/${name}.raw`, 'raw', SIZE)
      await trial.write(name, 0, SIZE)
    }
    return trial
  }

  async write(disk: string, offset: number, length: number): Promise<void> {
    await this.lab.guest(disk).write(offset, length, this.random.fill(Buffer.alloc(length)), 0, 0)
  }

  content(disk: string): Promise<Buffer> {
    return readWhole(this.lab.guest(disk))
  }

  /** Takes the moment and holds the job there. */
  async begin(...disks: readonly string[]): Promise<string> {
    const { engine } = this.lab
    const { id } = await engine.backup({ disks, repository: LAB_REPOSITORY, full: false, onError: 'report', speed: 1 })
    return id
  }

  async end(id: string): Promise<JobStatus> {
    await this.lab.engine.setJobSpeed(id, 0)
    return this.lab.engine.jobEnded(id)
  }

  async good(...disks: readonly string[]): Promise<string> {
    const ended = await this.end(await this.begin(...disks))
    assert.equal(ended.error, undefined)
    return String(ended.details['backup'])
  }

  async shows(backup: string, index: number, content: Buffer): Promise<void> {
    const repository = await this.lab.repository()
    const reader = await repository.openBackup(backup)
    assert.ok((await readWhole((reader.disks[index] as { device: BlockDevice }).device)).equals(content))
    await reader.close()
    await repository.close()
  }

  async backups(): Promise<readonly string[]> {
    const repository = await this.lab.repository()
    const ids = (await repository.backups()).map(({ id }) => id)
    await repository.close()
    return ids
  }
}

test('a second write over a block that was saved leaves the backup with what was there at its moment', async (t) => {
  const trial = await Trial.start(t, 'vm')
  const moment = await trial.content('vm')
  const view = await trial.lab.engine.openView({ disks: ['vm'] })
  for (let round = 0; round < 3; round++) await trial.write('vm', 5 * GRANULE, 2 * GRANULE)
  await trial.lab.guest('vm').trim(6 * GRANULE, GRANULE, 0)
  const device = trial.lab.view(`vm@${view.id}`)
  assert.ok(device !== undefined)
  assert.ok((await readWhole(device)).equals(moment))
  await trial.lab.stop()
})

test('a save that fails breaks the backup and neither the guest nor the next backup', async (t) => {
  const trial = await Trial.start(t, 'vm')
  const { engine } = trial.lab
  await engine.editBitmaps('vm', [{ edit: 'add', name: 'b' }])
  await trial.write('vm', 0, 32 * GRANULE)
  const { id } = await engine.openView({ disks: ['vm'], bitmap: 'b' })
  trial.lab.host.beforeOperation = ({ kind, path }) => {
    if (kind === 'write' && path.endsWith('/scratch')) throw Object.assign(new Error('no scratch'), { code: 'EIO' })
  }
  await trial.write('vm', 31 * GRANULE, 2 * GRANULE)
  trial.lab.host.beforeOperation = undefined
  const device = trial.lab.view(`vm@${id}`)
  assert.ok(device !== undefined)
  await assert.rejects(readWhole(device), /broke: .*saving old data/)
  await engine.sayToJob(id, 'finalize')
  assert.equal((await engine.jobEnded(id)).error?.kind, 'io')
  assert.equal(engine.showDisk('vm').bitmaps[0]?.dirtyBytes, 33 * GRANULE)
  const content = await trial.content('vm')
  await trial.shows(await trial.good('vm'), 0, content)
  await trial.lab.stop()
})

test('a client that dies leaves no view, no scratch and no bit behind that the next backup would miss', async (t) => {
  const trial = await Trial.start(t, 'vm')
  await trial.lab.engine.editBitmaps('vm', [{ edit: 'add', name: 'b' }])
  await trial.write('vm', 3 * GRANULE, GRANULE)
  const view = await trial.lab.engine.openView({ disks: ['vm'], bitmap: 'b', leaseMs: 20 })
  await trial.write('vm', 9 * GRANULE, GRANULE)
  const ended = await trial.lab.engine.jobEnded(view.id)
  assert.equal(ended.error?.kind, 'timeout')
  assert.equal(trial.lab.view(`vm@${view.id}`), undefined)
  const shown = trial.lab.engine.showDisk('vm').bitmaps
  assert.deepEqual(
    shown.map(({ name, dirtyBytes, recording }) => [name, dirtyBytes, recording]),
    [['b', 2 * GRANULE, true]],
  )
  await trial.lab.stop()
})

test('a tail shorter than 4 KiB is saved, copied, restored and counted like any block', async (t) => {
  const trial = await Trial.start(t, 'vm')
  await trial.good('vm')
  await trial.write('vm', SIZE - 300, 300)
  const moment = await trial.content('vm')
  const id = await trial.begin('vm')
  await trial.write('vm', SIZE - 512, 512)
  const ended = await trial.end(id)
  assert.equal(ended.error, undefined)
  assert.equal(ended.details['readBytes'], 512)
  await trial.shows(String(ended.details['backup']), 0, moment)
  await trial.shows(await trial.good('vm'), 0, await trial.content('vm'))
  await trial.lab.stop()
})

test('of several disks each goes on from its own last backup, however they diverged', async (t) => {
  const trial = await Trial.start(t, 'a', 'b', 'c')
  await trial.good('a', 'b')
  await trial.write('a', 0, GRANULE)
  await trial.good('a')
  await trial.write('b', GRANULE, GRANULE)
  await trial.good('b', 'c')
  for (const disk of ['a', 'b', 'c']) await trial.write(disk, 2 * GRANULE, GRANULE)
  const contents = [await trial.content('a'), await trial.content('b'), await trial.content('c')]
  const ended = await trial.end(await trial.begin('a', 'b', 'c'))
  const disks = ended.details['disks'] as { kind: string; reason: string }[]
  assert.deepEqual(
    disks.map(({ kind }) => kind),
    ['incremental', 'incremental', 'incremental'],
  )
  assert.notEqual(disks[0]?.reason, disks[1]?.reason)
  assert.equal(disks[1]?.reason, disks[2]?.reason)
  assert.equal(ended.details['readBytes'], 3 * GRANULE)
  for (const [index, content] of contents.entries()) await trial.shows(String(ended.details['backup']), index, content)
  await trial.lab.stop()
})

test('a backup counts as done only when it is durable: whatever of its end fails or is cut off, its bits are there', async (t) => {
  const trial = await Trial.start(t, 'vm')
  const [first] = [await trial.good('vm')]
  await trial.write('vm', 4 * GRANULE, GRANULE)
  await trial.lab.guest('vm').flush()
  const content = await trial.content('vm')
  for (const part of ['packs/', 'indexes/', 'backups/']) {
    trial.lab.host.beforeOperation = ({ kind, path }) => {
      const isHit = path.startsWith(`${LAB_REPOSITORY}/${part}`) && (kind === 'sync' || kind === 'syncFolder')
      if (isHit) throw Object.assign(new Error('no store'), { code: 'EIO' })
    }
    const ended = await trial.end(await trial.begin('vm'))
    trial.lab.host.beforeOperation = undefined
    if (ended.error === undefined) continue
    const visible = await trial.backups()
    if (visible.length === 1) assert.deepEqual(visible, [first], part)
  }
  // With the power goes all that was not synced: a backup that is visible then is whole.
  const id = await trial.begin('vm')
  const forks: Lab[] = []
  trial.lab.host.beforeOperation = ({ kind }) => {
    if (kind === 'rename' || kind === 'sync' || kind === 'syncFolder') forks.push(trial.lab.fork('none'))
  }
  await trial.end(id)
  trial.lab.host.beforeOperation = undefined
  assert.ok(forks.length > 3)
  for (const lab of forks) {
    const after = new Trial(lab, trial.random)
    await lab.start()
    assert.equal((await lab.engine.jobEnded(id)).error, undefined)
    await after.shows(await after.good('vm'), 0, content)
    await lab.stop()
  }
  await trial.lab.stop()
})
