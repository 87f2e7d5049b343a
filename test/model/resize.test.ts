// Disks that grow, on whole engines on a simulated host: what is added reads as zeros whatever lies below, the bitmaps and with them
// the incremental backups go on, a smaller size is refused, and a crash anywhere leaves the old size or the new one.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { Random } from '../../src/base/random.ts'
import { BlockError, isBlockError } from '../../src/block/error.ts'
import type { JobStatus } from '../../src/job/job.ts'
import { Lab, LAB_REPOSITORY, readWhole } from '../support/lab.ts'

const CLUSTER = 65_536
const SIZE = 4 * CLUSTER + 2048

async function backup(lab: Lab, content: Buffer): Promise<string> {
  const job = await lab.engine.backup({ disks: ['vm'], repository: LAB_REPOSITORY, full: false, speed: 0 })
  const ended: JobStatus = await lab.engine.jobEnded(job.id)
  assert.equal(ended.error, undefined)
  const repository = await lab.repository()
  const reader = await repository.openBackup(String(ended.details['backup']))
  const device = reader.disks[0]?.device
  assert.ok(device !== undefined && (await readWhole(device)).equals(content))
  await reader.close()
  await repository.close()
  return (ended.details['disks'] as { kind: string }[])[0]?.kind as string
}

for (const format of ['qcow2', 'raw'] as const) {
  test(`a ${format} disk grows under its guest, over snapshots, reverts and restarts, and its backups stay incremental`, async () => {
    const lab = await Lab.create()
    const random = new Random(4)
    await lab.engine.createDisk('vm', `/images/vm.${format}`, format, SIZE)
    let content: Buffer = Buffer.alloc(SIZE)
    random.fill(content)
    let atSnapshot: Buffer = content
    await lab.guest('vm').write(0, SIZE, content, 0, 0)
    assert.equal(await backup(lab, content), 'full')
    for (const step of ['grow', 'snapshot', 'grow', 'restart', 'grow', 'revert', 'grow'] as const) {
      if (step === 'snapshot') {
        await lab.engine.createSnapshot('vm', 's')
        atSnapshot = Buffer.from(content)
      }
      if (step === 'restart') {
        await lab.stop()
        await lab.start()
      }
      if (step === 'revert') {
        await lab.engine.createSnapshot('vm', 'large')
        await lab.engine.revert('vm', 's')
        // A revert keeps the size.
        content.fill(0, SIZE + 5 * 512)
        content.set(atSnapshot)
      }
      if (step === 'grow') {
        const size = lab.guest('vm').size + 5 * 512
        assert.equal((await lab.engine.resizeDisk('vm', size)).size, size)
        content = Buffer.concat([content, Buffer.alloc(size - content.length)])
      }
      assert.ok((await readWhole(lab.guest('vm'))).equals(content), step)
      const tail = random.fill(Buffer.alloc(512))
      await lab.guest('vm').write(content.length - 512, 512, tail, 0, 0)
      content.set(tail, content.length - 512)
      assert.equal(await backup(lab, content), 'incremental', step)
    }
    await lab.stop()
  })
}

test('a disk does not shrink, and does not grow while a job runs, by a part of a sector or where the image has no place; then all is as before', async () => {
  const lab = await Lab.create()
  const { engine } = lab
  await engine.createDisk('vm', '/images/vm.qcow2', 'qcow2', SIZE)
  await lab.guest('vm').write(0, SIZE, Buffer.alloc(SIZE, 1), 0, 0)
  const refuses = async (size: number, kind: string, says: RegExp): Promise<void> => {
    await assert.rejects(
      engine.resizeDisk('vm', size),
      (error) => isBlockError(error) && error.kind === kind && says.test(error.message),
    )
    assert.equal(lab.guest('vm').size, SIZE)
    await lab.guest('vm').write(0, 512, Buffer.alloc(512, 2), 0, 0)
  }
  await refuses(
    SIZE - 2048,
    'invalid-argument',
    /the last 2\.00 KiB of its 258\.0 KiB would be lost.*varve image resize --shrink/,
  )
  await refuses(SIZE + 100, 'invalid-argument', /multiple of 512/)
  const { id } = await engine.backup({ disks: ['vm'], repository: LAB_REPOSITORY, full: true, speed: 50_000 })
  await refuses(2 * SIZE, 'busy', new RegExp(`resize has to wait: job ${id}`))
  await engine.setJobSpeed(id, 0)
  await lab.jobsEnd()
  lab.host.beforeOperation = ({ path }) => {
    if (path === '/images/vm.qcow2') throw new BlockError('no-space', 'the file system is full')
  }
  await assert.rejects(engine.resizeDisk('vm', 1000 * SIZE), /the file system is full/)
  lab.host.beforeOperation = undefined
  await refuses(SIZE - 2048, 'invalid-argument', /would be lost/)
  lab.catalog.beforeCommit = () => {
    throw new Error('the catalog is full')
  }
  await assert.rejects(engine.resizeDisk('vm', 2 * SIZE), /the catalog is full/)
  lab.catalog.beforeCommit = undefined
  assert.equal(lab.guest('vm').size, SIZE)
  assert.equal((await engine.resizeDisk('vm', SIZE)).size, SIZE)
  await lab.stop()
})

test('a crash while a disk grows leaves the old size or the new one, all flushed data, and the next backup incremental', async () => {
  const lab = await Lab.create()
  const { engine } = lab
  await engine.createDisk('vm', '/images/vm.qcow2', 'qcow2', SIZE)
  const content = Buffer.alloc(SIZE)
  new Random(2).fill(content)
  await lab.guest('vm').write(0, SIZE, content, 0, 0)
  assert.equal(await backup(lab, content), 'full')
  await engine.createSnapshot('vm', 's')
  await lab.guest('vm').write(0, 512, Buffer.alloc(512, 9), 0, 0)
  content.fill(9, 0, 512)
  await lab.guest('vm').flush()
  const keeps = new Random(7)
  const forks: Lab[] = []
  lab.host.beforeOperation = () => forks.push(lab.fork(), lab.fork(keeps))
  await engine.resizeDisk('vm', 20 * SIZE)
  lab.host.beforeOperation = undefined
  forks.push(lab.fork())
  await lab.stop()
  const sizes = new Set<number>()
  for (const fork of forks) {
    await fork.start()
    const status = fork.engine.showDisk('vm')
    assert.equal(status.error, undefined)
    sizes.add(status.size)
    assert.ok(status.size === SIZE || status.size === 20 * SIZE)
    const now = Buffer.concat([content, Buffer.alloc(status.size - SIZE)])
    assert.ok((await readWhole(fork.guest('vm'))).equals(now))
    assert.equal(await backup(fork, now), 'incremental')
    await fork.stop()
  }
  assert.ok(forks.length > 10 && sizes.has(20 * SIZE), `${forks.length}: ${[...sizes].join(', ')}`)
})

test('a snapshot keeps its size when its layer goes down into a smaller one while the disk is larger', async () => {
  const lab = await Lab.create()
  const { engine } = lab
  await engine.createDisk('vm', '/images/vm.qcow2', 'qcow2', SIZE)
  const content = Buffer.alloc(SIZE + 512)
  new Random(2).fill(content)
  await engine.createSnapshot('vm', 's1')
  await engine.resizeDisk('vm', SIZE + 512)
  await lab.guest('vm').write(0, content.length, content, 0, 0)
  await engine.createSnapshot('vm', 's2')
  await engine.resizeDisk('vm', 2 * SIZE)
  await lab.guest('vm').write(SIZE, SIZE, Buffer.alloc(SIZE, 7), 0, 0)
  await engine.deleteSnapshot('vm', 's1', 'down')
  await lab.jobsEnd()
  await engine.exportSnapshot('vm', 's2')
  const view = lab.view('vm@s2')
  assert.ok(view !== undefined && (await readWhole(view)).equals(content))
  await lab.stop()
})

test('a backup that is asked for while the disk grows has all of the larger disk', async () => {
  const lab = await Lab.create()
  const { engine } = lab
  await engine.createDisk('vm', '/images/vm.qcow2', 'qcow2', SIZE)
  const content = Buffer.alloc(SIZE + 512)
  new Random(2).fill(content.subarray(0, SIZE))
  await lab.guest('vm').write(0, SIZE, content, 0, 0)
  const disk = lab.disk('vm')
  const drain = disk.drain.bind(disk)
  let asked: Promise<string> | undefined
  disk.drain = async () => {
    disk.drain = drain
    asked = backup(lab, content)
    for (let turn = 0; turn < 1000; turn++) await new Promise((resolve) => setImmediate(resolve))
    await drain()
  }
  await engine.resizeDisk('vm', SIZE + 512)
  assert.equal(await asked, 'full')
  await lab.stop()
})
