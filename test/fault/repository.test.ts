// What a repository does when its store fails or changes bits: nothing half done becomes visible, nothing wrong is read, and
// every flipped bit is found.

import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { Random, seedOfRun } from '../../src/base/random.ts'
import { BlockError, isBlockError } from '../../src/block/error.ts'
import { SimulatedHost } from '../../src/host/simulated.ts'
import type { BackupInfo, Repository } from '../../src/repository/repository.ts'
import { InlineSqueezer } from '../../src/repository/squeezer.ts'
import type { ObjectStatus, ObjectStore } from '../../src/repository/store.ts'
import { DirectoryStore } from '../../src/repository/stores/directory.ts'
import { MemoryStore } from '../../src/repository/stores/memory.ts'
import { openRepository } from '../../src/repository/repository.ts'
import { backUp, initInline, openInline, restore } from '../support/backups.ts'

const KIB = 1024
const MIB = 1024 * KIB

/** Counts the requests and lets one of them, and those after it when `stays`, fail. */
class FailingStore implements ObjectStore {
  readonly name = 'failing'
  readonly #inner: ObjectStore
  requests = 0
  failAt = Number.POSITIVE_INFINITY
  stays = false

  constructor(inner: ObjectStore) {
    this.#inner = inner
  }

  async put(key: string, parts: readonly Uint8Array[]): Promise<void> {
    this.#count(key)
    return this.#inner.put(key, parts)
  }
  async get(key: string): Promise<Uint8Array> {
    this.#count(key)
    return this.#inner.get(key)
  }
  async getRange(key: string, offset: number, length: number): Promise<Uint8Array> {
    this.#count(key)
    return this.#inner.getRange(key, offset, length)
  }
  async status(key: string): Promise<ObjectStatus | undefined> {
    this.#count(key)
    return this.#inner.status(key)
  }
  async list(prefix: string): Promise<string[]> {
    this.#count(prefix)
    return this.#inner.list(prefix)
  }
  async remove(key: string): Promise<void> {
    this.#count(key)
    return this.#inner.remove(key)
  }

  #count(key: string): void {
    this.requests++
    if (this.requests === this.failAt || (this.stays && this.requests > this.failAt)) {
      throw new BlockError('io', `injected failure at ${key}`, { path: key })
    }
  }
}

function sample(seed: number, length: number): Buffer {
  const bytes = Buffer.alloc(length)
  new Random(seed).fill(bytes)
  bytes.fill('compressible text, ', length / 2, length / 2 + 300 * KIB)
  return bytes
}

suite('repository under failing stores', () => {
  for (const stays of [false, true]) {
    test(`when any one request of a backup fails${stays ? ' and all after it' : ''}, it fails as that, nothing is visible, and the next one succeeds`, async () => {
      const base = new MemoryStore()
      const content = sample(1, 20 * MIB)
      const first = await backUp(await initInline(base), content.subarray(0, 2 * MIB))
      for (let failAt = 1; ; failAt++) {
        const copy = new MemoryStore()
        for (const key of await base.list('')) await copy.put(key, [await base.get(key)])
        const store = new FailingStore(copy)
        const repository = await openInline(store)
        const limit = store.requests
        Object.assign(store, { failAt: limit + failAt, stays })
        const changes = [{ offset: 65_536, length: content.length - 65_536 }]
        const outcome = await backUp(repository, content, { id: first.id, changes }).catch((error: unknown) => error)
        Object.assign(store, { failAt: Number.POSITIVE_INFINITY })
        const visible = (await repository.backups()).map(({ id }) => id)
        if (!(outcome instanceof Error)) {
          assert.ok(store.requests > limit && failAt > 8, 'the sweep met the requests of a backup')
          return
        }
        assert.ok(isBlockError(outcome, 'io') && outcome.message.includes('injected failure'), String(outcome))
        assert.deepEqual(visible, [first.id], `request ${failAt}`)
        const again = await backUp(repository, content, { id: first.id, changes })
        assert.ok((await restore(await openInline(copy), again.id)).equals(content), `request ${failAt}`)
      }
    })
  }

  test('a read that failed fails as that, and the same read succeeds afterwards', async () => {
    const store = new FailingStore(new MemoryStore())
    const repository = await initInline(store)
    const content = sample(2, 3 * MIB)
    const { id } = await backUp(repository, content)
    for (let failAt = 1; ; failAt++) {
      const device = (await repository.openBackup(id)).disks[0]?.device
      assert.ok(device !== undefined)
      const into = Buffer.alloc(content.length)
      store.failAt = store.requests + failAt
      const outcome = await Promise.resolve(device.read(0, content.length, into, 0)).catch((error: unknown) => error)
      store.failAt = Number.POSITIVE_INFINITY
      if (outcome === undefined) {
        assert.ok(failAt > 4)
        return
      }
      assert.ok(isBlockError(outcome, 'io') && outcome.message.includes(id))
      await device.read(0, content.length, into, 0)
      assert.ok(into.equals(content))
    }
  })

  test('a full file system fails the backup as no-space, leaves nothing visible and no part of an object', async () => {
    const content = sample(3, 40 * MIB)
    for (const capacity of [5, 17, 24, 39]) {
      const host = new SimulatedHost({ capacity: capacity * MIB })
      const store = new DirectoryStore(host, '/srv/repository')
      const repository = await initInline(store)
      await assert.rejects(backUp(repository, content), (error) => isBlockError(error, 'no-space'))
      assert.deepEqual(await repository.backups(), [])
      for (const folder of ['', 'packs', 'index', 'backups']) {
        const names = await host.list(`/srv/repository/${folder}`)
        assert.deepEqual(
          names.filter((name) => name.endsWith('.part')),
          [],
        )
      }
      // Nor a session that a pruning, which is what now helps, would have to wait for.
      assert.deepEqual(await store.list('sessions/'), [])
      const small = await backUp(repository, content.subarray(0, 64 * KIB))
      assert.ok((await restore(await openInline(store), small.id)).equals(content.subarray(0, 64 * KIB)))
    }
  })

  test('a writer that is ahead of the store waits, and memory stays bounded', async () => {
    let waiting: (() => void)[] = []
    class SlowStore extends MemoryStore {
      override async put(key: string, parts: readonly Uint8Array[]): Promise<void> {
        if (key.startsWith('packs/')) await new Promise<void>((resolve) => waiting.push(resolve))
        return super.put(key, parts)
      }
    }
    const repository = await initInline(new SlowStore())
    const size = 400 * MIB
    const writer = await repository.begin({ machine: 'vm1', moment: 1, kind: 'full', disks: [{ name: 'sda', size }] })
    const buffer = Buffer.alloc(64 * KIB)
    const random = new Random(1)
    let taken = 0
    const writing = (async () => {
      for (; taken < size; taken += buffer.length) {
        buffer.fill(random.next(), 0, 4096).writeDoubleLE(taken)
        random.fill(buffer.subarray(4096))
        await writer.disk(0).write(taken, buffer.length, buffer, 0)
      }
    })()
    writing.catch(() => undefined)
    let before = -1
    while (taken !== before) {
      before = taken
      await new Promise((resolve) => setTimeout(resolve, 300))
    }
    assert.ok(taken > 32 * MIB && taken < 80 * MIB, `${taken / MIB} MiB were taken before it waited`)
    const aborted = writer.abort()
    for (const go of waiting) go()
    waiting = []
    await aborted
    await assert.rejects(writing, (error) => isBlockError(error, 'cancelled'))
  })

  test('a squeezer that fails fails the backup, not the process', async () => {
    class Broken extends InlineSqueezer {
      override async compress(): Promise<never> {
        throw new BlockError('io', 'the thread that hashes and compresses has ended')
      }
    }
    const store = new MemoryStore()
    await initInline(store)
    const repository = await openRepository(store, { squeezer: () => new Broken() })
    await assert.rejects(backUp(repository, sample(4, 30 * MIB)), (error) => isBlockError(error, 'io'))
    assert.deepEqual(await store.list('backups/'), [])
    assert.deepEqual(await store.list('packs/'), [])
  })
})

/** A store with one bit of one object changed. */
async function flipped(store: ObjectStore, victim: string, bit: number): Promise<MemoryStore> {
  const copy = new MemoryStore()
  for (const key of await store.list('')) {
    const bytes = await store.get(key)
    if (key === victim) bytes[bit >>> 3] = (bytes[bit >>> 3] as number) ^ (1 << (bit & 7))
    await copy.put(key, [bytes])
  }
  return copy
}

interface Sample {
  readonly store: MemoryStore
  readonly first: BackupInfo
  readonly info: BackupInfo
  readonly content: Buffer
}

/** A backup with an incremental: data compressed and raw, nodes of two levels, two packs, two indexes. */
async function twoBackups(): Promise<Sample> {
  const store = new MemoryStore()
  const repository = await initInline(store)
  const content = Buffer.alloc(17 * MIB)
  new Random(1).fill(content.subarray(0, 100_000))
  content.fill('compressible text, ', 16 * MIB, 16 * MIB + 100_000)
  const first = await backUp(repository, content)
  content.fill('changed', 8192, 16_384)
  const info = await backUp(repository, content, { id: first.id, changes: [{ offset: 8192, length: 8192 }] })
  return { store, first, info, content }
}

/** The parts of the sample that hold data, in bytes. */
const DATA = [
  [0, 256 * KIB],
  [16 * MIB, 16 * MIB + 256 * KIB],
] as const

async function restoreData(repository: Repository, id: string): Promise<Buffer[]> {
  const device = (await repository.openBackup(id)).disks[0]?.device
  const parts: Buffer[] = []
  for (const [from, to] of DATA) {
    const into = Buffer.alloc(to - from, 0xee)
    await device?.read(from, to - from, into, 0)
    parts.push(into)
  }
  return parts
}

/** What opening, verifying and restoring a damaged store come to. */
async function look(store: ObjectStore, { first, info, content }: Sample): Promise<{ found: boolean; wrong: boolean }> {
  let repository: Repository
  try {
    repository = await openInline(store)
  } catch (error) {
    assert.ok(isBlockError(error), String(error))
    return { found: true, wrong: false }
  }
  const kinds = new Set(['corrupt', 'invalid-format', 'not-found'])
  // What only the first backup still refers to is found by verifying that one.
  const isFirstGood = await repository.verify(first.id).then(
    ({ isGood }) => isGood,
    (error: unknown) => !isBlockError(error),
  )
  const report = await repository.verify(info.id).catch((error: unknown) => error)
  if (report instanceof Error) {
    assert.ok(isBlockError(report) && kinds.has(report.kind), String(report))
    return { found: true, wrong: false }
  }
  const { isGood, ranges, damagedBytes } = report as Awaited<ReturnType<Repository['verify']>>
  const restored = await restoreData(repository, info.id).catch((error: unknown) => error)
  if (restored instanceof Error) {
    assert.ok(isBlockError(restored, 'corrupt') && restored.message.includes(info.id), String(restored))
    assert.ok(damagedBytes > 0 && ranges.length > 0, 'what cannot be restored is in the report')
    return { found: !isGood || !isFirstGood, wrong: false }
  }
  assert.equal(damagedBytes, 0, 'what is in the report cannot be restored')
  return {
    found: !isGood || !isFirstGood,
    wrong: !DATA.every(([from, to], i) => (restored as Buffer[])[i]?.equals(content.subarray(from, to))),
  }
}

suite('repository and flipped bits', () => {
  test('a flipped bit in any object is found, and never gives wrong data', async (t) => {
    const random = new Random(seedOfRun())
    t.diagnostic(`VARVE_SEED=${random.seed}`)
    const sampleOf = await twoBackups()
    const keys = await sampleOf.store.list('')
    assert.equal(keys.length, 1 + 2 + 2 + 2)
    for (const key of keys) {
      const bits = (await sampleOf.store.get(key)).length * 8
      const first = Array.from({ length: 20 }, (_, i) => i * 7)
      const last = Array.from({ length: 40 }, (_, i) => bits - 1 - i * 17)
      const others = Array.from({ length: 50 }, () => random.below(bits))
      for (const bit of [...first, ...last, ...others].filter((candidate) => candidate >= 0 && candidate < bits)) {
        const { found, wrong } = await look(await flipped(sampleOf.store, key, bit), sampleOf)
        assert.ok(found, `seed ${random.seed}: bit ${bit} of ${key} was not found`)
        assert.ok(!wrong, `seed ${random.seed}: bit ${bit} of ${key} gave wrong data`)
      }
    }
  })

  test('an object that is cut short or gone is found, and never gives wrong data', async () => {
    const sampleOf = await twoBackups()
    for (const victim of await sampleOf.store.list('')) {
      for (const part of [undefined, 0, 10, 0.5, 0.99]) {
        const copy = new MemoryStore()
        for (const key of await sampleOf.store.list('')) {
          const bytes = await sampleOf.store.get(key)
          if (key !== victim) await copy.put(key, [bytes])
          else if (part !== undefined) await copy.put(key, [bytes.subarray(0, part < 1 ? bytes.length * part : part)])
        }
        const { found, wrong } = await look(copy, sampleOf)
        // An index that is gone is no damage: packs have their own directories.
        assert.ok(found || (victim.startsWith('index/') && part === undefined), `${victim} to ${part}`)
        assert.ok(!wrong, `${victim} to ${part}`)
      }
    }
  })

  test('a report names the disk, the range, the pack and the reason, and the rest still restores', async () => {
    const store = new MemoryStore()
    const repository = await initInline(store)
    const content = sample(7, 2 * MIB)
    const { id } = await backUp(repository, content)
    const pack = (await store.list('packs/'))[0] as string
    // Chunks are in the order of the disk, and random ones are raw: byte 16 + 70,000 is in the second 64 KiB.
    const reopened = await openInline(await flipped(store, pack, (16 + 70_000) * 8))
    const report = await reopened.verify(id)
    assert.equal(report.isGood, false)
    assert.equal(report.damagedBytes, 65_536)
    assert.deepEqual(
      report.ranges.map(({ disk, offset, length }) => ({ disk, offset, length })),
      [{ disk: 'sda', offset: 65_536, length: 65_536 }],
    )
    assert.match(report.ranges[0]?.reason ?? '', new RegExp(`${pack}.*checksum`))
    const device = (await reopened.openBackup(id)).disks[0]?.device
    const into = Buffer.alloc(content.length)
    await assert.rejects(
      async () => device?.read(100_000, 10, into, 0),
      (error) =>
        isBlockError(error, 'corrupt') && [id, 'sda', '100000', pack].every((word) => error.message.includes(word)),
    )
    await device?.read(0, 65_536, into, 0)
    await device?.read(131_072, content.length - 131_072, into, 131_072)
    content.copy(into, 65_536, 65_536, 131_072)
    assert.ok(into.equals(content))
  })

  test('a pack that is gone takes along only what was in it', async () => {
    const store = new MemoryStore()
    const repository = await initInline(store)
    const content = sample(8, 2 * MIB)
    const first = await backUp(repository, content)
    const firstPacks = await store.list('packs/')
    new Random(99).fill(content.subarray(40_960, 45_056))
    const second = await backUp(repository, content, { id: first.id, changes: [{ offset: 40_960, length: 4096 }] })
    for (const pack of await store.list('packs/')) if (!firstPacks.includes(pack)) await store.remove(pack)
    const reopened = await openInline(store)
    assert.equal((await reopened.verify(first.id)).damagedBytes, 0)
    const report = await reopened.verify(second.id)
    assert.ok(report.damagedBytes > 0 && !report.isGood)
    await assert.rejects(restore(reopened, second.id), (error) => isBlockError(error))
  })
})
