// Reverts of whole engines on a simulated host, against plain copies of the disk and of every snapshot: random writes, snapshots,
// reverts, deletions, merges, incremental backups and restarts; and a crash at every operation of a revert.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { Random, seedOfRun } from '../../src/base/random.ts'
import type { BlockDevice } from '../../src/block/device.ts'
import { isBlockError } from '../../src/block/error.ts'
import type { JobStatus } from '../../src/job/job.ts'
import { Lab, LAB_REPOSITORY, readWhole } from '../support/lab.ts'

const CLUSTER = 65_536
const SIZE = 8 * CLUSTER
const STEPS = Number(process.env['VARVE_STEPS'] ?? 120)

/** A disk and what it and its snapshots must hold. */
class Twin {
  readonly lab: Lab
  readonly snapshots = new Map<string, Buffer>()
  content: Buffer = Buffer.alloc(SIZE)
  readonly #random: Random
  #names = 0

  constructor(lab: Lab, random: Random) {
    this.lab = lab
    this.#random = random
  }

  name(): string {
    return `s${++this.#names}`
  }

  async write(): Promise<void> {
    const length = this.#random.between(1, 20_000)
    const offset = this.#random.below(SIZE - length)
    const guest = this.lab.guest('vm')
    if (this.#random.chance(0.2)) {
      await guest.zero(offset, length, 2)
      this.content.fill(0, offset, offset + length)
      return
    }
    const bytes = this.#random.fill(Buffer.alloc(length))
    await guest.write(offset, length, bytes, 0, 0)
    this.content.set(bytes, offset)
  }

  async snapshot(): Promise<void> {
    const name = this.name()
    await this.lab.engine.createSnapshot('vm', name)
    this.snapshots.set(name, Buffer.from(this.content))
  }

  async revert(): Promise<void> {
    const [name, content] = this.#random.pick([...this.snapshots])
    const keep = this.#random.chance(0.5) ? this.name() : undefined
    await this.lab.engine.revert('vm', name, keep)
    if (keep !== undefined) this.snapshots.set(keep, this.content)
    this.content = Buffer.from(content)
  }

  /** A deletion or a merge, unless other snapshots lie on what it would change. */
  async merge(): Promise<void> {
    const { engine } = this.lab
    const kind = this.#random.pick(['delete', 'delete', 'commit', 'stream'] as const)
    const victim = this.#random.pick([...this.snapshots.keys()])
    try {
      const ends = kind === 'delete' ? [victim] : kind === 'commit' ? engine.planCommit('vm') : engine.planStream('vm')
      const job = kind === 'delete' ? await engine.deleteSnapshot('vm', victim) : await engine[kind]('vm')
      assert.equal((await engine.jobEnded(job.id)).error, undefined)
      for (const name of ends) this.snapshots.delete(name)
    } catch (error) {
      assert.ok(
        isBlockError(error, 'busy') && /other snapshots lie on, beside the chain: s\d/.test(error.message),
        String(error),
      )
    }
  }

  /** An incremental, but for the first, restores to what the disk holds. */
  async backup(): Promise<void> {
    const before = this.lab.engine.listJobs().some(({ kind }) => kind === 'backup')
    const job = await this.lab.engine.backup({ disks: ['vm'], repository: LAB_REPOSITORY, full: false, speed: 0 })
    const ended = await this.lab.engine.jobEnded(job.id)
    assert.equal(ended.error, undefined)
    assert.equal((ended.details['disks'] as { kind: string }[])[0]?.kind, before ? 'incremental' : 'full')
    const repository = await this.lab.repository()
    const reader = await repository.openBackup(String(ended.details['backup']))
    const device = reader.disks[0]?.device
    assert.ok(device !== undefined)
    assert.ok((await readWhole(device)).equals(this.content), 'the backup differs from the disk')
    await reader.close()
    await repository.close()
  }

  async restart(): Promise<void> {
    await this.lab.stop()
    await this.lab.start()
  }

  /** The disk is as it must be, and the snapshots are those that there must be. */
  async check(note: string): Promise<void> {
    const { engine } = this.lab
    assert.equal(engine.showDisk('vm').error, undefined, note)
    assert.ok((await readWhole(this.lab.guest('vm'))).equals(this.content), `${note}: the disk differs`)
    const listed = engine.listSnapshots('vm')
    assert.deepEqual(listed.map(({ name }) => name).sort(), [...this.snapshots.keys()].sort(), note)
    assert.deepEqual(this.lab.catalog.list('garbage'), [], note)
  }
}

const ACTIONS = ['write', 'write', 'write', 'write', 'snapshot', 'revert', 'merge', 'backup', 'restart'] as const

async function makeTwin(random: Random): Promise<Twin> {
  const lab = await Lab.create(random.chance(0.5) ? new Random(random.next()) : undefined)
  await lab.engine.createDisk('vm', '/images/vm.qcow2', 'qcow2', SIZE)
  return new Twin(lab, random)
}

test('a disk and all its snapshots hold what they must through reverts, merges, backups and restarts', async (t) => {
  const random = new Random(seedOfRun())
  t.diagnostic(`VARVE_SEED=${random.seed}`)
  for (let round = 0; round < 3; round++) {
    const twin = await makeTwin(random)
    for (let step = 0; step < STEPS; step++) {
      const action = random.pick(ACTIONS)
      if ((action === 'revert' || action === 'merge') && twin.snapshots.size === 0) continue
      if (action === 'snapshot' && twin.snapshots.size > 6) continue
      await twin[action]()
      await twin.check(`VARVE_SEED=${random.seed}, round ${round}, step ${step}: ${action}`)
    }
    // Each snapshot in its turn, also those beside the chain.
    for (const [name, content] of twin.snapshots) {
      await twin.lab.engine.revert('vm', name)
      twin.content = Buffer.from(content)
      await twin.check(`VARVE_SEED=${random.seed}, round ${round}, at the end: ${name}`)
    }
    await twin.lab.stop()
  }
})

test('a crash at any operation of a revert leaves the disk as before it or after it, and the next incremental is right', async (t) => {
  const random = new Random(seedOfRun())
  t.diagnostic(`VARVE_SEED=${random.seed}`)
  let done = 0
  let undone = 0
  for (const keep of ['kept', undefined]) {
    const twin = await makeTwin(random)
    const { lab } = twin
    for (const action of ['write', 'snapshot', 'write', 'backup', 'write', 'snapshot', 'write'] as const)
      await twin[action]()
    await lab.guest('vm').flush()
    const [name, target] = [...twin.snapshots][0] as [string, Buffer]
    const crashes: { readonly left: Lab; readonly note: string }[] = []
    lab.host.beforeOperation = ({ number }) => {
      for (const [what, kept] of [
        ['a kill', undefined],
        ['all unsynced lost', 'none'],
        ['some unsynced lost', random],
      ] as const) {
        crashes.push({
          left: lab.fork(kept),
          note: `VARVE_SEED=${random.seed}: ${what} at operation ${number}`,
        })
      }
    }
    await lab.engine.revert('vm', name, keep)
    lab.host.beforeOperation = undefined
    await lab.stop()
    for (const { left, note } of crashes) {
      await left.start()
      const after = new Twin(left, random)
      const isDone = (await readWhole(left.guest('vm'))).equals(target)
      if (isDone) done++
      else undone++
      after.content = isDone ? target : twin.content
      for (const [snapshot, content] of twin.snapshots) after.snapshots.set(snapshot, content)
      if (isDone && keep !== undefined) after.snapshots.set(keep, twin.content)
      await after.check(note)
      await after.backup()
      await left.stop()
    }
  }
  t.diagnostic(`${done} done, ${undone} undone`)
  assert.ok(done > 0 && undone > 0)
})

for (const second of ['backup', 'revert'] as const) {
  test(`a ${second} that begins at any operation of the other, revert or backup, leaves both right`, async () => {
    let reverted = 0
    let isMet = true
    for (let operation = 1; isMet && operation < 120; operation++) {
      const random = new Random(operation)
      const twin = await makeTwin(random)
      const { engine, host } = twin.lab
      for (const action of ['write', 'snapshot', 'write', 'backup', 'write'] as const) await twin[action]()
      const [name, target] = [...twin.snapshots][0] as [string, Buffer]
      const works = {
        backup: async () => engine.backup({ disks: ['vm'], repository: LAB_REPOSITORY, full: false, speed: 0 }),
        revert: async () => engine.revert('vm', name),
      }
      const meeting = Promise.withResolvers<void>()
      const end = host.operations + operation
      host.beforeOperation = ({ number }) => {
        if (number >= end) meeting.resolve()
      }
      const begin = async (work: 'backup' | 'revert'): Promise<unknown> => {
        if (work === second) {
          await meeting.promise
          return works[work]()
        }
        try {
          return await works[work]()
        } finally {
          isMet = host.operations >= end
          meeting.resolve()
        }
      }
      const [backup, revert] = (await Promise.allSettled([begin('backup'), begin('revert')])) as [
        PromiseSettledResult<JobStatus>,
        PromiseSettledResult<void>,
      ]
      host.beforeOperation = undefined
      assert.ok(backup.status === 'fulfilled')
      const ended = await engine.jobEnded(backup.value.id)
      assert.equal(ended.error, undefined)
      if (revert.status === 'rejected') assert.ok(isBlockError(revert.reason, 'busy'), String(revert.reason))
      else reverted++
      const repository = await twin.lab.repository()
      const reader = await repository.openBackup(String(ended.details['backup']))
      const restored = await readWhole(reader.disks[0]?.device as BlockDevice)
      await reader.close()
      await repository.close()
      const before = restored.equals(twin.content)
      const after = revert.status === 'fulfilled' && restored.equals(target)
      assert.ok(before || after, `second at operation ${operation}: the backup shows neither`)
      if (revert.status === 'fulfilled') twin.content = target
      await twin.backup()
      await twin.lab.stop()
    }
    // Also where the backup was asked for first, but was no job yet: its repository is opened before.
    assert.ok(reverted > 0)
  })
}

test('a revert is refused while a job runs, to a snapshot that is not there, and under a name in use', async () => {
  const { lab } = await makeTwin(new Random(1))
  const { engine } = lab
  await lab.guest('vm').write(0, SIZE, Buffer.alloc(SIZE, 1), 0, 0)
  await engine.createSnapshot('vm', 'one')
  const refuses = (
    work: Promise<void>,
    kind: 'busy' | 'not-found' | 'exists' | 'invalid-argument',
    says: RegExp,
  ): Promise<void> => assert.rejects(work, (error) => isBlockError(error, kind) && says.test(error.message))
  await refuses(engine.revert('vm', 'nope'), 'not-found', /no snapshot nope: varve snapshot list vm/)
  await refuses(engine.revert('vm', 'one', 'one'), 'exists', /has a snapshot one already/)
  await refuses(engine.revert('vm', 'one', 'a/b'), 'invalid-argument', /snapshot name "a\/b"/)
  const backup = await engine.backup({ disks: ['vm'], repository: LAB_REPOSITORY, full: true, speed: 200_000 })
  await refuses(engine.revert('vm', 'one'), 'busy', new RegExp(`revert has to wait: job ${backup.id} is at work`))
  await engine.setJobSpeed(backup.id, 0)
  await lab.jobsEnd()
  const merge = await engine.stream('vm', undefined, undefined, { speed: 200_000 })
  await refuses(engine.revert('vm', 'one'), 'busy', new RegExp(merge.id))
  await engine.setJobSpeed(merge.id, 0)
  await lab.jobsEnd()
  await lab.stop()
})

test('snapshots beside the chain say what they follow, hold what they lie on, and their files go with them', async () => {
  const { lab } = await makeTwin(new Random(1))
  const { engine } = lab
  for (const name of ['one', 'two', 'three']) await engine.createSnapshot('vm', name)
  await engine.revert('vm', 'one', 'before')
  const listed = (): unknown[] => engine.listSnapshots('vm').map(({ name, after, inChain }) => [name, after, inChain])
  assert.deepEqual(listed(), [
    ['one', undefined, true],
    ['two', 'one', false],
    ['three', 'two', false],
    ['before', 'three', false],
  ])
  await assert.rejects(
    engine.commit('vm'),
    (error) => isBlockError(error, 'busy') && /: two, three, before\. Delete them first/.test(error.message),
  )
  const files = async (): Promise<number> => (await lab.host.list('/images')).length
  assert.equal(await files(), 5)
  // In the middle only the name goes: what lies on it needs its file.
  await engine.deleteSnapshot('vm', 'three')
  assert.equal(await files(), 5)
  await engine.deleteSnapshot('vm', 'before')
  assert.equal(await files(), 3)
  await engine.deleteSnapshot('vm', 'two')
  assert.equal(await files(), 2)
  await lab.jobsEnd()
  await engine.commit('vm')
  await lab.jobsEnd()
  assert.deepEqual(listed(), [])
  await lab.stop()
})

test('a backup that comes to its moment while a revert is under way waits for it', async () => {
  const twin = await makeTwin(new Random(2))
  const { engine } = twin.lab
  for (const action of ['write', 'snapshot', 'write', 'backup', 'write'] as const) await twin[action]()
  const [name, target] = [...twin.snapshots][0] as [string, Buffer]
  const disk = twin.lab.disk('vm')
  const flush = disk.flush.bind(disk)
  let backup: Promise<JobStatus> | undefined
  // The bitmaps have what the revert changes, and the disk has not changed yet.
  disk.flush = async () => {
    if (backup === undefined) {
      backup = engine.backup({ disks: ['vm'], repository: LAB_REPOSITORY, full: false, speed: 0 })
      for (let turn = 0; turn < 1000; turn++) await new Promise((resolve) => setImmediate(resolve))
    }
    await flush()
  }
  await engine.revert('vm', name)
  const { id } = (await backup) as JobStatus
  const { details } = await engine.jobEnded(id)
  const repository = await twin.lab.repository()
  const reader = await repository.openBackup(String(details['backup']))
  assert.ok((await readWhole(reader.disks[0]?.device as BlockDevice)).equals(target))
  await reader.close()
  await repository.close()
  twin.content = target
  await twin.backup()
  await twin.lab.stop()
})
