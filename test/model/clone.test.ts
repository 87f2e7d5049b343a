// Clones of whole engines on a simulated host: two disks over layers that they share, each of which changes nothing for the other;
// what is refused while a layer is held, and by whose name; what frees it; and a crash at every operation of a clone's making.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { Random } from '../../src/base/random.ts'
import { isBlockError } from '../../src/block/error.ts'
import { Lab, LAB_REPOSITORY, readWhole } from '../support/lab.ts'

const CLUSTER = 65_536
const SIZE = 8 * CLUSTER

/** Disk vm with snapshots s1 and s2, and what they hold. */
async function makeOrigin(lab: Lab): Promise<{ readonly s1: Buffer; readonly s2: Buffer; readonly now: Buffer }> {
  const random = new Random(5)
  await lab.engine.createDisk('vm', '/images/vm.qcow2', 'qcow2', SIZE)
  const contents: Buffer[] = []
  for (const name of ['s1', 's2', undefined]) {
    for (let write = 0; write < 6; write++) {
      const bytes = random.fill(Buffer.alloc(20_000))
      await lab.guest('vm').write(random.below(SIZE - bytes.length), bytes.length, bytes, 0, 0)
    }
    contents.push(await readWhole(lab.guest('vm')))
    if (name !== undefined) await lab.engine.createSnapshot('vm', name)
  }
  const [s1, s2, now] = contents as [Buffer, Buffer, Buffer]
  return { s1, s2, now }
}

async function makeClone(): Promise<{
  readonly lab: Lab
  readonly s1: Buffer
  readonly s2: Buffer
  readonly now: Buffer
}> {
  const lab = await Lab.create()
  const contents = await makeOrigin(lab)
  await lab.engine.clone('vm', 's1', 'web')
  return { lab, ...contents }
}

function refuses(work: () => Promise<unknown>, says: RegExp): Promise<void> {
  return assert.rejects(work, (error) => isBlockError(error, 'busy') && says.test(error.message))
}

test('a clone shows its snapshot, and what either disk writes the other does not see, over restarts too', async () => {
  const { lab, s1, now } = await makeClone()
  assert.ok((await readWhole(lab.guest('web'))).equals(s1))
  await lab.guest('web').write(1000, 5000, Buffer.alloc(5000, 7), 0, 0)
  s1.fill(7, 1000, 6000)
  await lab.guest('vm').write(CLUSTER, 5000, Buffer.alloc(5000, 8), 0, 0)
  now.fill(8, CLUSTER, CLUSTER + 5000)
  for (let start = 0; start < 2; start++) {
    assert.ok((await readWhole(lab.guest('web'))).equals(s1))
    assert.ok((await readWhole(lab.guest('vm'))).equals(now))
    assert.deepEqual(
      lab.engine.showDisk('web').layers.map(({ path, of }) => [path, of]),
      [
        ['/images/vm.qcow2', 'vm'],
        ['/images/web.qcow2', undefined],
      ],
    )
    await lab.stop()
    await lab.start()
  }
  const backup = await lab.engine.backup({ disks: ['vm', 'web'], repository: LAB_REPOSITORY, full: false, speed: 0 })
  assert.equal((await lab.engine.jobEnded(backup.id)).error, undefined)
  await lab.stop()
})

test('what a clone uses is not merged, removed or reverted away by the other disk, nor the other way round, and the refusal says who holds it', async () => {
  const { lab, s1, now } = await makeClone()
  const { engine } = lab
  const heldByWeb =
    /\/images\/vm\.qcow2 is held by disk web, a clone\. To free it: varve stream web gives web all it needs of its own, or varve disk remove web$/
  await refuses(() => engine.commit('vm'), heldByWeb)
  await refuses(() => engine.deleteSnapshot('vm', 's1'), heldByWeb)
  await refuses(() => engine.stream('vm'), heldByWeb)
  await refuses(() => engine.removeDisk('vm'), heldByWeb)
  const heldByVm =
    /is held by disk vm, whose layer it is\. To free it: varve stream web gives web all it needs of its own$/
  await refuses(() => engine.commit('web'), heldByVm)
  await refuses(() => engine.deleteSnapshot('web', 's1', 'down'), heldByVm)
  // What lies above the shared layer is the disk's own affair.
  assert.equal((await engine.jobEnded((await engine.deleteSnapshot('vm', 's2')).id)).error, undefined)
  assert.ok((await readWhole(lab.guest('web'))).equals(s1))
  assert.ok((await readWhole(lab.guest('vm'))).equals(now))
  await lab.stop()
})

test('a snapshot beside the chain that a clone lies on stays until the clone is gone', async () => {
  const lab = await Lab.create()
  const { s2 } = await makeOrigin(lab)
  const { engine } = lab
  await engine.revert('vm', 's1')
  await engine.clone('vm', 's2', 'web', '/images/other.qcow2')
  assert.ok((await readWhole(lab.guest('web'))).equals(s2))
  await refuses(
    () => engine.deleteSnapshot('vm', 's2'),
    /deletion of snapshot s2 of disk vm is not possible: \/images\/vm\.varve-1\.qcow2 is held by disk web, a clone/,
  )
  await engine.removeDisk('web')
  await engine.deleteSnapshot('vm', 's2')
  assert.equal(await lab.host.status('/images/vm.varve-1.qcow2'), undefined)
  assert.notEqual(await lab.host.status('/images/other.qcow2'), undefined)
  await lab.jobsEnd()
  await lab.stop()
})

test('a streamed or removed clone frees the layers, whose files stay for the disk that has them', async () => {
  for (const how of ['stream', 'delete', 'remove'] as const) {
    const { lab, s1, now } = await makeClone()
    const { engine } = lab
    if (how === 'stream') await engine.stream('web')
    else if (how === 'delete') {
      const { details } = await engine.deleteSnapshot('web', 's1')
      assert.equal(details['reason'], 'the layer is that of disk vm')
    } else await engine.removeDisk('web')
    await lab.jobsEnd()
    assert.notEqual(await lab.host.status('/images/vm.qcow2'), undefined)
    if (how !== 'remove')
      assert.deepEqual(
        engine.showDisk('web').layers.map(({ path }) => path),
        ['/images/web.qcow2'],
      )
    assert.equal((await engine.jobEnded((await engine.commit('vm')).id)).error, undefined)
    assert.ok((await readWhole(lab.guest('vm'))).equals(now))
    if (how !== 'remove') assert.ok((await readWhole(lab.guest('web'))).equals(s1))
    assert.deepEqual(lab.catalog.list('garbage'), [])
    await lab.stop()
  }
})

test('clones of one snapshot, and a clone of a clone, leave shared layers at the same time, through crashes', async () => {
  const { lab, s1 } = await makeClone()
  await lab.engine.clone('vm', 's1', 'web2')
  await lab.engine.createSnapshot('web', 'mine')
  await lab.engine.clone('web', 'mine', 'deep')
  await refuses(() => lab.engine.removeDisk('web'), /is held by disk deep, a clone/)
  const forks: Lab[] = []
  lab.host.beforeOperation = ({ number }) => {
    if (number % 4 === 0) forks.push(lab.fork(number % 8 === 0 ? new Random(number) : undefined))
  }
  const jobs = await Promise.all(['web2', 'deep'].map((disk) => lab.engine.stream(disk)))
  for (const { id } of jobs) assert.equal((await lab.engine.jobEnded(id)).error, undefined)
  lab.host.beforeOperation = undefined
  await lab.stop()
  assert.ok(forks.length > 10)
  for (const fork of forks) {
    await fork.start()
    await fork.jobsEnd()
    for (const disk of ['web', 'web2', 'deep']) {
      const status = fork.engine.showDisk(disk)
      assert.equal(status.error, undefined)
      assert.ok((await readWhole(fork.guest(disk))).equals(s1), disk)
    }
    assert.deepEqual(fork.catalog.list('garbage'), [])
    await fork.stop()
  }
})

test('a clone is refused under a name or an image in use, of a snapshot that is not there, and while layers are merged; nothing is left', async () => {
  const { lab } = await makeClone()
  const { engine } = lab
  const fails = (work: Promise<unknown>, kind: 'exists' | 'not-found' | 'busy', says: RegExp): Promise<void> =>
    assert.rejects(work, (error) => isBlockError(error, kind) && says.test(error.message))
  await fails(engine.clone('vm', 's1', 'web'), 'exists', /there is a disk web already/)
  await fails(engine.clone('vm', 's1', 'vm.varve-1'), 'exists', /name another image for the clone/)
  await fails(engine.clone('vm', 'nope', 'other'), 'not-found', /no snapshot nope/)
  const { id } = await engine.deleteSnapshot('vm', 's2', 'down', { speed: 100_000 })
  await fails(engine.clone('vm', 's1', 'other'), 'busy', new RegExp(`clone has to wait: job ${id}`))
  await engine.setJobSpeed(id, 0)
  await lab.jobsEnd()
  assert.deepEqual(await lab.host.list('/images'), ['vm.qcow2', 'vm.varve-1.qcow2', 'web.qcow2'])
  assert.deepEqual(lab.catalog.list('garbage'), [])
  await lab.stop()
})

test('a crash while a clone is made leaves all of it or nothing', async () => {
  const lab = await Lab.create()
  const { s1, now } = await makeOrigin(lab)
  // A crash of the host takes what was not flushed.
  await lab.guest('vm').flush()
  const forks: Lab[] = []
  const keeps = new Random(9)
  lab.host.beforeOperation = () => forks.push(lab.fork(), lab.fork(keeps))
  await lab.engine.clone('vm', 's1', 'web')
  lab.host.beforeOperation = undefined
  forks.push(lab.fork())
  await lab.stop()
  let made = 0
  for (const fork of forks) {
    await fork.start()
    const disks = fork.engine.listDisks()
    assert.deepEqual(
      disks.filter(({ state }) => state !== 'open'),
      [],
    )
    assert.ok((await readWhole(fork.guest('vm'))).equals(now))
    const isMade = disks.length === 2
    if (isMade) assert.ok((await readWhole(fork.guest('web'))).equals(s1))
    else assert.equal(await fork.host.status('/images/web.qcow2'), undefined)
    if (isMade) made++
    assert.deepEqual(fork.catalog.list('garbage'), [])
    await fork.stop()
  }
  assert.ok(made > 0 && made < forks.length, `${made} of ${forks.length}`)
})

test('an exported snapshot shows what it holds over writes, reverts and restarts, and holds its layers until it is unexported', async () => {
  const lab = await Lab.create()
  const { s1, s2, now } = await makeOrigin(lab)
  const { engine } = lab
  for (const name of ['s1', 's2']) assert.equal(await engine.exportSnapshot('vm', name), `lab:vm@${name}`)
  await lab.guest('vm').write(0, SIZE, Buffer.alloc(SIZE, 1), 0, 0)
  await engine.revert('vm', 's1', 'full')
  await lab.stop()
  await lab.start()
  for (const [name, content] of [
    ['s1', s1],
    ['s2', s2],
  ] as const) {
    const view = lab.view(`vm@${name}`)
    assert.ok(view !== undefined)
    assert.ok((await readWhole(view)).equals(content))
  }
  const again = lab.engine
  const held = /held by the export of snapshot s1 of disk vm.*To free it: varve snapshot unexport vm s1/
  await again.deleteSnapshot('vm', 'full')
  await refuses(() => again.deleteSnapshot('vm', 's2'), /held by the export of snapshot s2 of disk vm/)
  await again.unexportSnapshot('vm', 's2')
  assert.equal(lab.view('vm@s2'), undefined)
  await again.deleteSnapshot('vm', 's2')
  await lab.jobsEnd()
  for (const work of [
    () => again.commit('vm'),
    () => again.stream('vm'),
    () => again.deleteSnapshot('vm', 's1'),
    () => again.removeDisk('vm'),
  ])
    await refuses(work, held)
  await again.unexportSnapshot('vm', 's1')
  await again.deleteSnapshot('vm', 's1')
  await lab.jobsEnd()
  assert.ok((await readWhole(lab.guest('vm'))).equals(s1))
  assert.ok(!s1.equals(now))
  const fails = (work: Promise<unknown>, kind: 'exists' | 'not-found' | 'busy', says: RegExp): Promise<void> =>
    assert.rejects(work, (error) => isBlockError(error, kind) && says.test(error.message))
  await fails(again.unexportSnapshot('vm', 's1'), 'not-found', /no export of a snapshot s1/)
  await fails(again.exportSnapshot('vm', 's1'), 'not-found', /no snapshot s1/)
  await again.createSnapshot('vm', 's3')
  await again.exportSnapshot('vm', 's3')
  await fails(again.exportSnapshot('vm', 's3'), 'exists', /is exported already/)
  // A clone may go from what its snapshot's export shows only when that has ended.
  await again.clone('vm', 's3', 'web')
  await again.exportSnapshot('web', 's3')
  await refuses(() => again.stream('web'), /held by the export of snapshot s3 of disk web/)
  await lab.stop()
})
