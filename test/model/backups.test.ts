// Backups on a whole engine on a simulated host: a full by comparison stores only what differs and says why it is one; a backup that breaks,
// by whatever, is gone on with from what the repository has of it, by the bytes; a bitmap that lost a write is found by a proof
// and trusted no longer.

import assert from 'node:assert/strict'
import { type TestContext, test } from 'node:test'
import { Random, seedOfRun } from '../../src/base/random.ts'
import type { BlockDevice } from '../../src/block/device.ts'
import { isBlockError } from '../../src/block/error.ts'
import type { BackupRequest } from '../../src/engine/backups.ts'
import type { EngineOptions } from '../../src/engine/engine-options.ts'
import type { JobStatus } from '../../src/job/job.ts'
import type { BackupInfo } from '../../src/repository/repository.ts'
import { Lab, LAB_REPOSITORY, readWhole } from '../support/lab.ts'

const MIB = 1024 * 1024
const GRANULE = 4096
const SIZE = 8 * MIB + 1536
/** A part is kept at every MiB. */
const PACE = { everyMs: 0, everyBytes: MIB, lastBytes: GRANULE }

interface DiskDetails {
  readonly kind: string
  readonly reason: string
  readonly compared?: string
}

class Trial {
  lab: Lab
  readonly random: Random

  constructor(lab: Lab, random: Random) {
    this.lab = lab
    this.random = random
  }

  async disk(name: string, format: 'raw' | 'qcow2' = 'qcow2'): Promise<void> {
    await this.lab.engine.createDisk(name, `/images/${name}.${format}`, format, SIZE)
  }

  /** Fills a range with data that is nowhere else. */
  async write(offset: number, length: number, name = 'vm'): Promise<void> {
    const data = this.random.fill(Buffer.alloc(length))
    await this.lab.guest(name).write(offset, length, data, 0, 0)
  }

  content(name = 'vm'): Promise<Buffer> {
    return readWhole(this.lab.guest(name))
  }

  async begin(request: Partial<BackupRequest> = {}): Promise<string> {
    const { id } = await this.lab.engine.backup({
      disks: ['vm'],
      repository: LAB_REPOSITORY,
      full: false,
      speed: 0,
      ...request,
    })
    return id
  }

  async backUp(request: Partial<BackupRequest> = {}): Promise<JobStatus> {
    return this.lab.engine.jobEnded(await this.begin(request))
  }

  /** What a successful backup did, and that it shows the disk. */
  async good(
    request: Partial<BackupRequest> = {},
  ): Promise<DiskDetails & { read: number; stored: number; id: string }> {
    const ended = await this.backUp(request)
    assert.equal(ended.error, undefined)
    const { details } = ended
    const [disk] = details['disks'] as DiskDetails[]
    assert.ok(disk !== undefined)
    const id = String(details['backup'])
    for (const [index, name] of (request.disks ?? ['vm']).entries())
      assert.ok((await this.restored(id, index)).equals(await this.content(name)), `${id} shows ${name}`)
    return { ...disk, read: Number(details['readBytes']), stored: Number(details['storedBytes']), id }
  }

  async restored(id: string, index = 0): Promise<Buffer> {
    const repository = await this.lab.repository()
    const reader = await repository.openBackup(id)
    const bytes = await readWhole((reader.disks[index] as { device: BlockDevice }).device)
    await reader.close()
    await repository.close()
    return bytes
  }

  async info(id: string): Promise<BackupInfo> {
    const repository = await this.lab.repository()
    const info = await repository.backup(id)
    await repository.close()
    return info
  }

  async parts(): Promise<number> {
    const repository = await this.lab.repository()
    const { length } = await repository.parts()
    await repository.close()
    return length
  }

  /** The bitmap of the disk's backups. */
  bitmap(name = 'vm'): string {
    const found = [...this.lab.disk(name).log.bitmaps.keys()].filter((key) => /^backup:[^:]+$/.test(key))
    assert.equal(found.length, 1)
    return found[0] as string
  }
}

async function start(
  t: TestContext,
  limits: Pick<EngineOptions, 'scratchBytes' | 'partPace'> = { partPace: PACE },
): Promise<Trial> {
  const random = new Random(seedOfRun())
  t.diagnostic(`VARVE_SEED=${random.seed}`)
  const trial = new Trial(await Lab.create(undefined, limits), random)
  await trial.disk('vm')
  return trial
}

test('a proof finds a write that the bitmap has lost; nothing wrong is stored, and the next backup is a full by comparison', async (t) => {
  const trial = await start(t)
  await trial.write(0, 4 * MIB)
  const first = await trial.good()
  await trial.write(MIB, GRANULE)
  // Behind the bitmap's back.
  const { log } = trial.lab.disk('vm')
  await trial.write(2 * MIB, 2 * GRANULE)
  await log.clear(trial.bitmap(), 2 * MIB, 2 * GRANULE)
  const found = await trial.backUp({ prove: 100 })
  assert.equal(found.error?.kind, 'corrupt')
  assert.match(found.error?.message ?? '', /8192 differ from the earlier backup, first at 2097152.*full by comparison/)
  const repository = await trial.lab.repository()
  assert.deepEqual(
    (await repository.backups()).map(({ id }) => id),
    [first.id],
  )
  await repository.close()
  assert.equal(await trial.parts(), 0)
  const shown = trial.lab.engine.showDisk('vm').bitmaps.find(({ name }) => name === trial.bitmap())
  assert.match(shown?.distrust ?? '', /a proof failed: of \d+ bytes/)
  // Also after a crash.
  trial.lab = trial.lab.fork('none')
  await trial.lab.start()
  const next = await trial.good()
  assert.equal(next.kind, 'full')
  assert.equal(next.compared, first.id)
  assert.match(next.reason, /a proof failed/)
  assert.ok(next.stored < 100_000, `stored ${next.stored}`)
  assert.equal((await trial.good({ prove: 100 })).kind, 'incremental')
  await trial.lab.stop()
})

test('a proof of a good bitmap reads its part of what did not change, at places that its seed in the record names', async (t) => {
  const trial = await start(t)
  await trial.write(0, 8 * MIB)
  await trial.good()
  await trial.write(0, MIB)
  const ended = await trial.backUp({ prove: 25 })
  assert.equal(ended.error, undefined)
  const [proof] = ended.details['proofs'] as { percent: number; seed: number; readBytes: number }[]
  assert.ok(proof !== undefined)
  const part = proof.readBytes / (7 * MIB)
  assert.ok(part > 0.15 && part < 0.35, `read ${part} of it`)
  const [disk] = (await trial.info(String(ended.details['backup']))).disks
  const { kind, proved, provedSeed, provedBytes } = disk?.labels ?? {}
  assert.deepEqual(
    [kind, proved, provedSeed, provedBytes],
    ['incremental', '25 %', String(proof.seed), String(proof.readBytes)],
  )
  const refused = { message: /more than 0 and up to 100 percent/ }
  for (const prove of [0, -1, 101, Number.NaN]) await assert.rejects(trial.begin({ prove }), refused)
  await trial.lab.stop()
})

test('a proof goes on while the guest writes, and takes its writes for no difference', async (t) => {
  const trial = await start(t)
  await trial.write(0, 4 * MIB)
  await trial.good()
  await trial.write(0, GRANULE)
  const moment = await trial.content()
  const id = await trial.begin({ prove: 100 })
  await trial.write(0, 3 * MIB)
  const ended = await trial.lab.engine.jobEnded(id)
  assert.equal(ended.error, undefined)
  assert.ok((await trial.restored(String(ended.details['backup']))).equals(moment))
  await trial.good({ prove: 100 })
  await trial.lab.stop()
})

test('where nothing says what changed, a full for that disk alone is compared with the last backup and stores what differs', async (t) => {
  const trial = await start(t)
  await trial.disk('other', 'raw')
  await trial.write(0, 4 * MIB)
  await trial.write(0, 4 * MIB, 'other')
  const both = { disks: ['vm', 'other'] }
  const first = await trial.good(both)
  // The bitmap of one goes; some of its data changes, becomes zeros, and comes where zeros were.
  await trial.lab.disk('vm').log.edit([{ kind: 'remove', name: trial.bitmap() }])
  await trial.write(5 * GRANULE, 512)
  await trial.lab.guest('vm').zero(MIB, 16 * GRANULE, 0)
  await trial.write(SIZE - 600, 600)
  await trial.write(9 * GRANULE, GRANULE, 'other')
  const ended = await trial.backUp(both)
  assert.equal(ended.error, undefined)
  const [vm, other] = ended.details['disks'] as DiskDetails[]
  assert.equal(vm?.kind, 'full')
  assert.equal(vm?.compared, first.id)
  assert.match(vm?.reason ?? '', /no earlier backup of this disk in this repository is known/)
  assert.equal(other?.kind, 'incremental')
  const id = String(ended.details['backup'])
  for (const [index, name] of both.disks.entries())
    assert.ok((await trial.restored(id, index)).equals(await trial.content(name)), name)
  const info = await trial.info(id)
  assert.equal(info.kind, 'full')
  assert.deepEqual(
    info.disks.map(({ labels, changedBytes }) => [labels['kind'], labels['compared'], changedBytes]),
    [
      ['full', first.id, 17 * GRANULE + (SIZE % GRANULE === 0 ? GRANULE : SIZE % GRANULE)],
      ['incremental', undefined, GRANULE],
    ],
  )
  assert.ok(Number(ended.details['storedBytes']) < 100_000)
  assert.equal((await trial.good(both)).kind, 'incremental')
  await trial.lab.stop()
})

test('growing and reverting stay incremental; a backup that was forgotten makes a full by comparison with the one before', async (t) => {
  const trial = await start(t)
  await trial.write(0, MIB)
  const first = await trial.good()
  await trial.lab.engine.createSnapshot('vm', 's')
  await trial.write(0, 3 * GRANULE)
  await trial.good()
  await trial.lab.engine.revert('vm', 's')
  assert.equal((await trial.good()).kind, 'incremental')
  await trial.lab.engine.resizeDisk('vm', SIZE + 512 + MIB)
  const grown = await trial.good()
  assert.equal(grown.kind, 'incremental')
  const repository = await trial.lab.repository()
  for (const { id } of await repository.backups()) if (id !== first.id) await repository.forget(id)
  await repository.close()
  const next = await trial.good()
  assert.deepEqual([next.kind, next.compared], ['full', first.id])
  assert.match(next.reason, /is no longer in the repository/)
  await trial.lab.stop()
})

for (const breaks of ['cancelled', 'killed', 'power failed', 'stopped'] as const) {
  for (const kind of ['full', 'incremental'] as const) {
    test(`a ${kind} backup that is ${breaks} goes on from what the repository has, and neither copies nor stores that again`, async (t) => {
      const trial = await start(t)
      await trial.write(0, 8 * MIB)
      if (kind === 'incremental') {
        await trial.good()
        await trial.write(0, 6 * MIB)
      }
      // After a power loss, what was written in the last epochs of the log counts as changed: this was written before them.
      for (let fold = 0; fold < 3; fold++) await trial.lab.disk('vm').log.fold()
      const todo = kind === 'full' ? 8 * MIB : 6 * MIB
      const id = await trial.begin()
      await pauseAt(trial, id, 3 * MIB)
      let before = 0
      if (breaks === 'cancelled') {
        await trial.lab.engine.sayToJob(id, 'cancel')
        before = Number((await trial.lab.engine.jobEnded(id)).details['readBytes'])
      } else {
        before = trial.lab.engine.showJob(id).done
        const left = trial.lab
        if (breaks === 'stopped') await left.stop()
        else trial.lab = left.fork(breaks === 'killed' ? undefined : 'none')
        await trial.lab.start()
        await trial.lab.engine.sayToJob(id, 'resume')
      }
      // What went on by itself is done; what was cancelled goes on with the next one.
      const resumed = breaks === 'cancelled' ? await trial.backUp() : await trial.lab.engine.jobEnded(id)
      assert.equal(resumed.error, undefined)
      const [disk] = resumed.details['disks'] as DiskDetails[]
      assert.match(disk?.reason ?? '', /goes on where \S+ broke off/)
      assert.equal(disk?.kind, kind)
      const again = Number(resumed.details['readBytes'])
      assert.ok(again <= todo - 2 * MIB, `of ${todo} bytes ${before} were copied, then ${again}`)
      assert.ok(again >= todo - before - MIB)
      assert.ok((await trial.restored(String(resumed.details['backup']))).equals(await trial.content()))
      assert.equal(await trial.parts(), 0)
      assert.equal((await trial.good()).kind, 'incremental')
      await trial.lab.stop()
    })
  }
}

test('scratch that is used up breaks a backup; the next one has what was copied, and what the guest wrote since', async (t) => {
  const trial = await start(t, { partPace: { ...PACE, everyMs: 3_600_000 }, scratchBytes: 64 * GRANULE })
  await trial.write(0, 8 * MIB)
  const id = await trial.begin()
  await pauseAt(trial, id, 2 * MIB)
  await trial.write(MIB, GRANULE)
  await trial.write(5 * MIB, 3 * MIB)
  await trial.lab.engine.sayToJob(id, 'resume')
  const broken = await trial.lab.engine.jobEnded(id)
  assert.equal(broken.error?.kind, 'no-space')
  const next = await trial.good()
  assert.match(next.reason, /goes on where/)
  assert.ok(next.read <= 6 * MIB + GRANULE, `read ${next.read}`)
  await trial.lab.stop()
})

test('a repository that fails leaves what was kept before, and a backup that was asked to be full leaves the bits as they were', async (t) => {
  const trial = await start(t)
  await trial.write(0, 4 * MIB)
  await trial.good()
  await trial.write(0, GRANULE)
  const full = await trial.begin({ full: true })
  await pauseAt(trial, full, 2 * MIB)
  await trial.lab.engine.sayToJob(full, 'cancel')
  await trial.lab.engine.jobEnded(full)
  assert.equal(await trial.parts(), 0)
  const next = await trial.good()
  assert.deepEqual([next.kind, next.read], ['incremental', GRANULE])

  await trial.write(0, 6 * MIB)
  const id = await trial.begin({ onError: 'report' })
  await pauseAt(trial, id, 2 * MIB)
  trial.lab.host.beforeOperation = ({ path }) => {
    if (path.startsWith(`${LAB_REPOSITORY}/packs`)) throw Object.assign(new Error('no store'), { code: 'EIO' })
  }
  await trial.lab.engine.sayToJob(id, 'resume')
  const broken = await trial.lab.engine.jobEnded(id)
  assert.ok(isKind(broken, 'io'), JSON.stringify(broken.error))
  trial.lab.host.beforeOperation = undefined
  const after = await trial.good()
  assert.match(after.reason, /goes on where/)
  assert.ok(after.read <= 5 * MIB, `read ${after.read}`)
  await trial.lab.stop()
})

test('parts are listed nowhere, and a pruning keeps the one that is needed and takes the others', async (t) => {
  const trial = await start(t)
  await trial.write(0, 8 * MIB)
  const id = await trial.begin()
  await pauseAt(trial, id, 3 * MIB)
  await trial.lab.engine.sayToJob(id, 'cancel')
  await trial.lab.engine.jobEnded(id)
  assert.equal(await trial.parts(), 1)
  const repository = await trial.lab.repository()
  assert.deepEqual(await repository.backups(), [])
  await repository.prune()
  assert.equal((await repository.parts()).length, 1)
  assert.ok((await repository.check()).isGood)
  const next = await trial.good()
  assert.ok(next.read <= 6 * MIB)
  assert.equal((await repository.parts()).length, 0)
  await repository.prune({ keep: { last: 1 } })
  await repository.close()
  assert.ok((await trial.restored(next.id)).equals(await trial.content()))
  await trial.lab.stop()
})

/** Pauses the job as soon as it has copied so much. */
async function pauseAt(trial: Trial, id: string, bytes: number): Promise<void> {
  const { engine } = trial.lab
  const paused = Promise.withResolvers<unknown>()
  const unwatch = engine.watchJob(id, ({ done, state }) => {
    if (state === 'running' && done >= bytes) paused.resolve(engine.sayToJob(id, 'pause'))
  })
  await paused.promise
  unwatch()
}

function isKind({ error }: JobStatus, kind: string): boolean {
  return error?.kind === kind || isBlockError(error, kind as never)
}
