// Disks in threads: a backup of disks that live in different ones, and what a thread's death means for its disks (a pause), for
// the others (nothing), and for a backup in which it takes part. In this process, so that a thread can be killed.

import assert from 'node:assert/strict'
import fs from 'node:fs'
import path from 'node:path'
import { type TestContext, test } from 'node:test'
import { Random } from '../../src/base/random.ts'
import { isBlockError } from '../../src/block/error.ts'
import { type Home, homeAt } from '../../src/engine/home.ts'
import { SqliteCatalog } from '../../src/engine/sqlite-catalog.ts'
import { realHost } from '../../src/host/real.ts'
import type { JobStatus } from '../../src/job/job.ts'
import { connectNbd, type NbdClient } from '../../src/nbd/client.ts'
import { initRepositoryAt, openRepositoryAt } from '../../src/shard/repositories.ts'
import { Shards } from '../../src/shard/shards.ts'
import { readWhole } from '../support/lab.ts'
import { tempFolder } from '../support/temp.ts'

const MIB = 1024 * 1024

interface Setup {
  readonly shards: Shards
  readonly home: Home
  readonly repository: string
  readonly reports: string[]
  readonly guest: (disk: string) => Promise<NbdClient>
}

async function setUp(t: TestContext, disks: readonly string[], count = 2): Promise<Setup> {
  const folder = tempFolder(t)
  const home = homeAt(path.join(folder, 'home'))
  for (const socket of [home.lock, home.nbdSocket('x'), home.viewSocket('x')])
    fs.mkdirSync(path.dirname(socket), { recursive: true })
  const repository = path.join(folder, 'repository')
  await (await initRepositoryAt(repository)).close()
  const reports: string[] = []
  const shards = await openShards(home, count, reports)
  t.after(() => shards.close())
  for (const disk of disks) await shards.createDisk(disk, path.join(folder, `${disk}.qcow2`), 'qcow2', 16 * MIB)
  const guest = async (disk: string): Promise<NbdClient> => {
    const { uri } = await shards.showDisk(disk)
    assert.ok(uri !== undefined)
    const client = await connectNbd(uri, { reconnectMs: 20_000 })
    t.after(() => client.close())
    return client
  }
  return { shards, home, repository, reports, guest }
}

function openShards(home: Home, count: number, reports: string[] = []): Promise<Shards> {
  const openCatalog = (): SqliteCatalog => new SqliteCatalog(home.catalog)
  return Shards.open({ host: realHost, home, openCatalog, count, report: (what) => reports.push(what) })
}

async function backedUp(shards: Shards, repository: string, disks: readonly string[], speed = 0): Promise<JobStatus> {
  const job = await shards.backup({ disks, repository, full: false, speed })
  return shards.jobEnded(job.id)
}

async function restored(repository: string, backup: string, disk: string): Promise<Buffer> {
  const opened = await openRepositoryAt(repository)
  const reader = await opened.openBackup(backup)
  const device = reader.disks.find(({ name }) => name === disk)?.device
  assert.ok(device !== undefined)
  const bytes = await readWhole(device)
  await reader.close()
  await opened.close()
  return bytes
}

function noise(seed: number, length: number): Buffer {
  const bytes = Buffer.alloc(length)
  new Random(seed).fill(bytes)
  return bytes
}

test('a clone and the disk it was made of hold each other’s layers, in one thread and in two', async (t) => {
  const { shards, home, guest } = await setUp(t, ['a'])
  const first = await guest('a')
  await first.write(0, MIB, noise(1, MIB), 0, 0)
  const then = await readWhole(first)
  await shards.createSnapshot('a', 's')
  await first.write(0, MIB, noise(2, MIB), 0, 0)
  const now = await readWhole(first)
  await shards.clone('a', 's', 'web')
  const uri = await shards.exportSnapshot('a', 's')
  await first.flush()
  await shards.close()
  // From the catalog the two go to different threads.
  const again = await openShards(home, 2)
  t.after(() => again.close())
  assert.equal(again.running, 2)
  const held = (error: unknown): boolean =>
    isBlockError(error, 'busy') && /is held by .*disk web, a clone/.test(error.message)
  await assert.rejects(again.commit('a'), held)
  await assert.rejects(again.removeDisk('a'), held)
  const read = async (disk: string): Promise<Buffer> => {
    const client = await connectNbd((await again.showDisk(disk)).uri as string)
    const bytes = await readWhole(client)
    await client.close()
    return bytes
  }
  assert.ok((await read('web')).equals(then))
  assert.ok((await read('a')).equals(now))
  const view = await connectNbd(uri)
  assert.equal(view.can.write, false)
  assert.ok((await readWhole(view)).equals(then))
  await view.close()
  assert.deepEqual(again.exportNames, ['a', 'a@s', 'web'])
  await again.unexportSnapshot('a', 's')
  await assert.rejects(connectNbd(uri))
  const stream = await again.stream('web')
  assert.equal((await again.jobEnded(stream.id)).error, undefined)
  const commit = await again.commit('a')
  assert.equal((await again.jobEnded(commit.id)).error, undefined)
  assert.ok((await read('web')).equals(then))
  assert.ok((await read('a')).equals(now))
})

test('a snapshot of disks in different threads is of all or of none, and a thread that dies is no third', async (t) => {
  const { shards, guest } = await setUp(t, ['a', 'b', 'c'])
  const guests = await Promise.all(['a', 'b', 'c'].map(guest))
  const snapshots = async (): Promise<number[]> =>
    Promise.all(['a', 'b', 'c'].map(async (disk) => (await shards.listSnapshots(disk)).length))
  let goesOn = true
  const writing = (async () => {
    for (let number = 1; goesOn; number++)
      for (const one of guests) await one.write(0, 4096, Buffer.alloc(4096, number), 0, 0)
  })()
  await shards.createSnapshots(['c', 'a', 'b'], 'one')
  assert.deepEqual(await snapshots(), [1, 1, 1])
  await shards.createSnapshot('b', 'two')
  await assert.rejects(shards.createSnapshots(['a', 'b', 'c'], 'two'), /disk b has a snapshot two already/)
  assert.deepEqual(await snapshots(), [1, 2, 1])
  // The thread of b dies somewhere in between.
  for (let round = 0; round < 4; round++) {
    const asked = shards.createSnapshots(['a', 'b', 'c'], `r${round}`).then(
      () => true,
      () => false,
    )
    await new Promise((resolve) => setTimeout(resolve, round * 3))
    await shards.kill(1)
    await asked
    for (const one of guests) await one.read(0, 4096, Buffer.alloc(4096), 0)
    const [a, b, c] = await snapshots()
    assert.ok(a === c && b === (a as number) + 1, `${a}, ${b}, ${c}`)
  }
  goesOn = false
  await writing
  const bytes = await Promise.all(
    ['a', 'b', 'c'].map(async (disk) => {
      const client = await connectNbd(await shards.exportSnapshot(disk, 'one'))
      const block = await readWhole(client)
      await client.close()
      return block[0] as number
    }),
  )
  const [a, b, c] = bytes as [number, number, number]
  const before = (x: number, y: number): boolean => x === y || x === (y + 1) % 256
  assert.ok(before(a, b) && before(b, c) && before(a, c), bytes.join(', '))
})

test('a backup of disks in different threads holds one moment of all, then only what changed', async (t) => {
  const { shards, repository, guest } = await setUp(t, ['a', 'b', 'c'])
  assert.equal(shards.running, 2)
  const guests = await Promise.all(['a', 'b', 'c'].map(guest))
  for (const [i, one] of guests.entries()) await one.write(i * MIB, 3 * MIB, noise(i, 3 * MIB), 0, 0)
  const before = await Promise.all(guests.map(readWhole))
  const started = await shards.backup({ disks: ['a', 'b', 'c'], repository, full: false, speed: 0 })
  // After the moment: what is saved, and not what the backup holds.
  await Promise.all(guests.map((one, i) => one.write(i * MIB, 3 * MIB, noise(100 + i, 3 * MIB), 0, 0)))
  const full = await shards.jobEnded(started.id)
  assert.equal(full.error, undefined, full.error?.message)
  for (const [i, disk] of ['a', 'b', 'c'].entries())
    assert.ok((await restored(repository, full.details['backup'] as string, disk)).equals(before[i] as Buffer), disk)

  await guests[2]?.write(9 * MIB, 4096, noise(7, 4096), 0, 0)
  const now = await Promise.all(guests.map(readWhole))
  const second = await backedUp(shards, repository, ['a', 'b', 'c'])
  assert.equal(second.error, undefined, second.error?.message)
  const kinds = (second.details['disks'] as { kind: string }[]).map(({ kind }) => kind)
  assert.deepEqual(kinds, ['incremental', 'incremental', 'incremental'])
  assert.equal(second.details['readBytes'], 9 * MIB + 4096)
  for (const [i, disk] of ['a', 'b', 'c'].entries())
    assert.ok((await restored(repository, second.details['backup'] as string, disk)).equals(now[i] as Buffer), disk)
})

test('a thread that dies is started again: its disks pause, the others do not notice, and no acknowledged write is lost', async (t) => {
  const { shards, repository, reports, guest } = await setUp(t, ['a', 'b'])
  const [first, second] = [await guest('a'), await guest('b')]
  const data = noise(1, 4 * MIB)
  await first.write(0, data.length, data, 0, 0)
  await backedUp(shards, repository, ['a'])
  await first.write(8 * MIB, 4096, data, 0, 0)
  await shards.createSnapshot('a', 'one')
  await shards.kill(0)
  await second.write(0, MIB, data, 0, 0)
  assert.equal(second.reconnections, 0)
  const expected = Buffer.alloc(16 * MIB)
  expected.set(data)
  expected.set(data.subarray(0, 4096), 8 * MIB)
  assert.ok((await readWhole(first)).equals(expected))
  assert.ok(first.reconnections > 0)
  assert.ok(reports.some((what) => what.includes('shard 0')))
  assert.deepEqual(
    (await shards.listSnapshots('a')).map(({ name }) => name),
    ['one'],
  )
  const job = await backedUp(shards, repository, ['a'])
  assert.equal(job.details['readBytes'], 4096, 'the bitmap is exact after the death')
})

test('a backup ends with the thread that makes it and begins again there; disks of other threads lose no bit', async (t) => {
  const { shards, repository, guest } = await setUp(t, ['a', 'b'])
  const guests = [await guest('a'), await guest('b')]
  for (const one of guests) await one.write(0, 4 * MIB, noise(3, 4 * MIB), 0, 0)
  assert.equal((await backedUp(shards, repository, ['a', 'b'])).error, undefined)
  for (const one of guests) await one.write(2 * MIB, 4 * MIB, noise(4, 4 * MIB), 0, 0)
  const job = await shards.backup({ disks: ['a', 'b'], repository, full: false, speed: MIB })
  await shards.kill(0)
  await guests[1]?.write(12 * MIB, 4096, noise(5, 4096), 0, 0)
  await until(async () => {
    return (await shards.listJobs()).some(({ id, state }) => id === job.id && state === 'running')
  })
  await shards.setJobSpeed(job.id, 0)
  const ended = await shards.jobEnded(job.id)
  assert.equal(ended.error, undefined, ended.error?.message)
  for (const [i, disk] of ['a', 'b'].entries()) {
    const found = await restored(repository, ended.details['backup'] as string, disk)
    assert.ok(found.equals(await readWhole(guests[i] as NbdClient)), disk)
  }
  const kinds = (ended.details['disks'] as { kind: string }[]).map(({ kind }) => kind)
  assert.deepEqual(kinds, ['incremental', 'incremental'])
})

test('a backup fails when the thread of another of its disks dies, says so, and the next one is incremental', async (t) => {
  const { shards, repository, guest } = await setUp(t, ['a', 'b'])
  const guests = [await guest('a'), await guest('b')]
  for (const one of guests) await one.write(0, 4 * MIB, noise(3, 4 * MIB), 0, 0)
  await backedUp(shards, repository, ['a', 'b'])
  for (const one of guests) await one.write(2 * MIB, 4 * MIB, noise(4, 4 * MIB), 0, 0)
  const job = await shards.backup({ disks: ['a', 'b'], repository, full: false, speed: 2 * MIB })
  await shards.kill(1)
  const ended = await shards.jobEnded(job.id)
  assert.ok(ended.error !== undefined)
  await until(async () => (await shards.showDisk('b').catch(() => undefined))?.state === 'open')
  const next = await backedUp(shards, repository, ['a', 'b'])
  assert.equal(next.error, undefined, next.error?.message)
  assert.equal(next.details['readBytes'], 8 * MIB)
  for (const [i, disk] of ['a', 'b'].entries()) {
    const found = await restored(repository, next.details['backup'] as string, disk)
    assert.ok(found.equals(await readWhole(guests[i] as NbdClient)), disk)
  }
})

test('names, jobs and disks are looked up across threads, and what is not there is said', async (t) => {
  const { shards } = await setUp(t, ['a', 'b', 'c'])
  assert.deepEqual(
    (await shards.listDisks()).map(({ name }) => name),
    ['a', 'b', 'c'],
  )
  await assert.rejects(shards.showDisk('d'), /there is no disk d/)
  await assert.rejects(shards.showJob('backup-1'), /there is no job/)
  await assert.rejects(shards.createDisk('a', '/nowhere/x', 'raw', MIB), /there is a disk a already/)
  await shards.removeDisk('b')
  assert.deepEqual(
    (await shards.listDisks()).map(({ name }) => name),
    ['a', 'c'],
  )
  await assert.rejects(shards.removeDisk('b'), /there is no disk b/)
})

async function until(test: () => Promise<boolean>): Promise<void> {
  const deadline = performance.now() + 20_000
  while (!(await test())) {
    assert.ok(performance.now() < deadline, 'it did not come about in time')
    await new Promise((resolve) => setTimeout(resolve, 20))
  }
}
