// Checkpoints on a whole engine on a simulated host: differentials and incrementals into one repository and into several, each reading what
// changed since its own moment and showing the disk as it was; and crashes.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { GRANULE } from '../../src/base/limits.ts'
import { isBlockError } from '../../src/block/error.ts'
import { Lab, LAB_REPOSITORY, readWhole } from '../support/lab.ts'

const SIZE = 64 * GRANULE
const OTHER_REPOSITORY = '/repository-2'

interface Marks {
  readonly since?: string
  readonly checkpoint?: string
  readonly full?: boolean
}

class Trial {
  lab: Lab
  content = Buffer.alloc(SIZE)
  #stamp = 0

  private constructor(lab: Lab) {
    this.lab = lab
  }

  static async start(): Promise<Trial> {
    const trial = new Trial(await Lab.create())
    await trial.lab.makeRepository(OTHER_REPOSITORY)
    await trial.lab.engine.createDisk('vm', '/images/vm.qcow2', 'qcow2', SIZE)
    await trial.write(0, 64)
    return trial
  }

  async write(first: number, count = 1): Promise<void> {
    const bytes = Buffer.alloc(count * GRANULE, ++this.#stamp)
    await this.lab.guest('vm').write(first * GRANULE, bytes.length, bytes, 0, 0)
    this.content.set(bytes, first * GRANULE)
  }

  /** Takes one, which must show the disk; gives how it was taken. */
  async backup(marks: Marks = {}, repository = LAB_REPOSITORY): Promise<{ reason: string; granules: number }> {
    const { engine } = this.lab
    const { id } = await engine.backup({ disks: ['vm'], repository, full: false, speed: 0, ...marks })
    const { error, details } = await engine.jobEnded(id)
    assert.equal(error, undefined)
    const opened = await this.lab.repository(repository)
    const reader = await opened.openBackup(String(details['backup']))
    const device = reader.disks[0]?.device
    assert.ok(device !== undefined && (await readWhole(device)).equals(this.content), 'the backup shows the disk')
    await reader.close()
    await opened.close()
    const [disk] = details['disks'] as readonly { readonly reason: string }[]
    return { reason: disk?.reason ?? '', granules: Number(details['readBytes']) / GRANULE }
  }

  get checkpoints(): string[] {
    const { bitmaps } = this.lab.engine.showDisk('vm')
    return bitmaps.flatMap(({ name, since }) => (name.startsWith('checkpoint:') && since !== undefined ? [name] : []))
  }
}

test('a differential reads what changed since its checkpoint, an incremental what changed since the last backup', async () => {
  const trial = await Trial.start()
  assert.equal((await trial.backup({ checkpoint: 'sunday' })).granules, 64)
  await trial.write(3)
  assert.equal((await trial.backup()).granules, 1)
  await trial.write(5)
  await trial.write(9)
  const monday = await trial.backup({ since: 'sunday', checkpoint: 'monday' })
  assert.equal(monday.granules, 3)
  assert.match(monday.reason, /^differential, changes since checkpoint sunday: /)
  await trial.write(11)
  assert.equal((await trial.backup()).granules, 1, 'the incremental counts from the differential')
  await trial.write(12)
  assert.equal((await trial.backup({ since: 'monday' })).granules, 2)
  assert.equal((await trial.backup({ since: 'sunday' })).granules, 5, 'a checkpoint stays as it is')
  assert.deepEqual(trial.checkpoints, ['checkpoint:sunday', 'checkpoint:monday'])
  await trial.lab.stop()
})

test('each repository has its own since, and a checkpoint is worth nothing in another repository, which is said', async () => {
  const trial = await Trial.start()
  await trial.backup({ checkpoint: 'sunday' })
  await trial.write(1)
  assert.equal((await trial.backup({}, OTHER_REPOSITORY)).granules, 64)
  await trial.write(2)
  const other = await trial.backup({ since: 'sunday' }, OTHER_REPOSITORY)
  assert.equal(other.granules, 1)
  assert.match(other.reason, /changes since .*; not since sunday: the earlier backup .* is no longer in the repository/)
  assert.equal((await trial.backup()).granules, 2)
  await trial.lab.stop()
})

test('a checkpoint is there when its backup is done, and not if that fails or a crash ends it', async () => {
  const trial = await Trial.start()
  await trial.backup()
  const { engine } = trial.lab
  const request = { disks: ['vm'], repository: LAB_REPOSITORY, full: false, finalize: 'manual' } as const
  const { id } = await engine.backup({ ...request, checkpoint: 'one' })
  assert.deepEqual(trial.checkpoints, [])
  const remove = [{ edit: 'remove', name: 'checkpoint:one' }] as const
  await assert.rejects(engine.editBitmaps('vm', remove), (error) => isBlockError(error, 'busy'))
  await engine.sayToJob(id, 'cancel')
  await engine.jobEnded(id)
  assert.deepEqual(trial.checkpoints, [])
  const { id: second } = await engine.backup({ ...request, checkpoint: 'one' })
  trial.lab = trial.lab.fork('none')
  await trial.lab.start()
  await trial.lab.engine.sayToJob(second, 'cancel')
  await trial.lab.engine.jobEnded(second)
  assert.deepEqual(trial.checkpoints, [])
  await trial.backup({ checkpoint: 'one' })
  trial.lab = trial.lab.fork('none')
  await trial.lab.start()
  assert.deepEqual(trial.checkpoints, ['checkpoint:one'])
  await trial.write(7)
  assert.match((await trial.backup({ since: 'one' })).reason, /^differential/)
  await trial.lab.engine.editBitmaps('vm', remove)
  assert.deepEqual(trial.checkpoints, [])
  await trial.lab.stop()
})

test('a bitmap of backups can be removed, but not while one is under way; the next one there compares', async () => {
  const trial = await Trial.start()
  await trial.backup()
  await trial.write(4)
  const { engine } = trial.lab
  const bitmap = engine.showDisk('vm').bitmaps.find(({ name }) => name.startsWith('backup:'))?.name ?? ''
  const remove = [{ edit: 'remove', name: bitmap }] as const
  const { id } = await engine.backup({ disks: ['vm'], repository: LAB_REPOSITORY, full: false, finalize: 'manual' })
  await assert.rejects(engine.editBitmaps('vm', remove), (error) => isBlockError(error, 'busy'))
  const captured = [{ edit: 'remove', name: `${bitmap}:captured` }] as const
  await assert.rejects(engine.editBitmaps('vm', captured), (error) => isBlockError(error, 'invalid-argument'))
  await engine.sayToJob(id, 'cancel')
  await engine.jobEnded(id)
  await engine.editBitmaps('vm', remove)
  assert.deepEqual(engine.showDisk('vm').bitmaps, [])
  assert.match((await trial.backup()).reason, /no earlier backup|bitmap/)
  await trial.write(6)
  assert.equal((await trial.backup()).granules, 1)
  await trial.lab.stop()
})

test('what cannot be asked for is refused before anything is done', async () => {
  const trial = await Trial.start()
  await trial.backup({ checkpoint: 'one' })
  const refused = async (marks: Marks & { prove?: number }, kind: 'exists' | 'not-found' | 'invalid-argument') => {
    const request = { disks: ['vm'], repository: LAB_REPOSITORY, full: false, ...marks }
    await assert.rejects(trial.lab.engine.backup(request), (error) => isBlockError(error, kind), JSON.stringify(marks))
  }
  await refused({ checkpoint: 'one' }, 'exists')
  await refused({ since: 'two' }, 'not-found')
  await refused({ since: 'one', full: true }, 'invalid-argument')
  await refused({ since: 'one', prove: 5 }, 'invalid-argument')
  await refused({ checkpoint: 'a:b' }, 'invalid-argument')
  assert.deepEqual(trial.checkpoints, ['checkpoint:one'])
  await trial.lab.stop()
})
