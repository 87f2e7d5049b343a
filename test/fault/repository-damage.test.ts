// Damage to a small repository at every byte of every object: a check finds it and names the backups that it hits, exactly those; what it does
// not hit restores. `npm test` looks at each 29th byte; VARVE_EVERY_BYTE=1 at all of them.

import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { Random } from '../../src/base/random.ts'
import { isBlockError } from '../../src/block/error.ts'
import {
  initRepository,
  openRepository,
  type Repository,
  type RepositoryOptions,
} from '../../src/repository/repository.ts'
import type { ObjectStore } from '../../src/repository/store.ts'
import { MemoryStore } from '../../src/repository/stores/memory.ts'
import { backUp, inline, noise, restore } from '../support/backups.ts'

const STEP = process.env['VARVE_EVERY_BYTE'] === undefined ? 29 : 1
const FILE = { kind: 'file', key: Buffer.alloc(32, 3) } as const

interface Sample {
  readonly store: MemoryStore
  readonly options: RepositoryOptions
  /** By id of the backup. */
  readonly contents: ReadonlyMap<string, Buffer>
}

/** Two backups that share some data and differ in some, a tag, a note, and a mark and session of somebody. */
async function sample(options: RepositoryOptions): Promise<Sample> {
  const store = new MemoryStore()
  const repository = await initRepository(store, options)
  const random = new Random(1)
  const one = noise(random, 12_288)
  one.fill('text ', 4096, 8192)
  const two = Buffer.from(one)
  noise(random, 4096).copy(two, 8192)
  const contents = new Map<string, Buffer>()
  const first = await backUp(repository, one, undefined, 1000)
  contents.set(first.id, one)
  contents.set(
    (await backUp(repository, two, { id: first.id, changes: [{ offset: 8192, length: 4096 }] }, 2000)).id,
    two,
  )
  const gone = await backUp(repository, noise(random, 4096), undefined, 3000)
  await repository.tag(first.id, { add: ['gold'] })
  await repository.forget(gone.id)
  return { store, options, contents }
}

async function copyOf(store: ObjectStore): Promise<MemoryStore> {
  const copy = new MemoryStore()
  for (const key of await store.list('')) await copy.put(key, [await store.get(key)])
  return copy
}

async function replace(store: ObjectStore, key: string, bytes: Uint8Array | undefined): Promise<void> {
  await store.remove(key)
  if (bytes !== undefined) await store.put(key, [bytes])
}

/** What a check of the damaged store says must be what restores show. */
async function checkDamage(
  { options, contents }: Sample,
  store: ObjectStore,
  key: string,
  note: string,
): Promise<void> {
  let repository: Repository
  try {
    repository = await openRepository(store, options)
  } catch (error) {
    // The config and the only key: nothing can be read, and that is said.
    assert.ok(key === 'config' || key.startsWith('keys/'), `${note}: ${String(error)}`)
    assert.ok(isBlockError(error) && error.kind !== 'io', note)
    return
  }
  const report = await repository.check({ reads: () => true })
  assert.ok(!report.isGood && report.objects.length > 0, `${note}: the check finds nothing`)
  assert.ok(
    report.objects.some((object) => object.key === key),
    `${note}: ${JSON.stringify(report.objects)} does not name ${key}`,
  )
  const hit = new Set(report.hit.map(({ id }) => id))
  for (const [id, content] of contents) {
    const found = await restore(repository, id).catch((error: unknown) => error)
    if (found instanceof Error) {
      assert.ok(hit.has(id), `${note}: ${id} does not restore, and is not named: ${found.message}`)
      assert.ok(
        isBlockError(found) && ['corrupt', 'not-found', 'invalid-format'].includes(found.kind),
        `${note}: ${found.message}`,
      )
    } else {
      assert.ok((found as Buffer).equals(content), `${note}: ${id} restores wrong data`)
      assert.ok(!hit.has(id), `${note}: ${id} restores, and is called damaged`)
    }
  }
}

for (const [name, options] of [
  ['a plain', inline()],
  ['an encrypted', { ...inline(), credential: FILE }],
] as const) {
  suite(`damage to ${name} repository`, () => {
    test('one flipped bit in any byte is found, and exactly the backups that it hits are named', async () => {
      const whole = await sample(options)
      assert.ok((await (await openRepository(whole.store, options)).check({ reads: () => true })).isGood)
      let start = 0
      for (const key of await whole.store.list('')) {
        const bytes = Buffer.from(await whole.store.get(key))
        for (let at = start % STEP; at < bytes.length; at += STEP) {
          const store = await copyOf(whole.store)
          const spoiled = Buffer.from(bytes)
          spoiled[at] = (spoiled[at] as number) ^ (1 << (at & 7))
          await replace(store, key, spoiled)
          await checkDamage(whole, store, key, `${key}, byte ${at}`)
        }
        start++
      }
    })

    test('an object cut at any length is found, and one that is gone too where something needs it', async () => {
      const whole = await sample(options)
      for (const key of await whole.store.list('')) {
        const bytes = await whole.store.get(key)
        for (let length = 0; length < bytes.length; length += STEP * 3) {
          const store = await copyOf(whole.store)
          await replace(store, key, bytes.subarray(0, length))
          await checkDamage(whole, store, key, `${key}, cut to ${length}`)
        }
        const store = await copyOf(whole.store)
        await replace(store, key, undefined)
        if (key.startsWith('packs/')) await checkDamage(whole, store, key, `${key}, gone`)
      }
    })

    test('a repair leaves a repository that checks, with all that was not hit', async () => {
      const whole = await sample(options)
      for (const key of await whole.store.list('')) {
        if (!key.startsWith('packs/') && !key.startsWith('index/')) continue
        const bytes = Buffer.from(await whole.store.get(key))
        for (let at = 3; at < bytes.length; at += Math.ceil(bytes.length / 40)) {
          const store = await copyOf(whole.store)
          const spoiled = Buffer.from(bytes)
          spoiled[at] = (spoiled[at] as number) ^ 32
          await replace(store, key, spoiled)
          const repository = await openRepository(store, options)
          const before = await repository.check({ reads: () => true })
          await repository.repair(before)
          const after = await repository.check({ reads: () => true })
          const note = `${key}, byte ${at}: ${JSON.stringify(after.objects)}`
          assert.deepEqual(after.objects, [], note)
          assert.deepEqual(
            after.hit.map(({ id }) => id),
            before.hit.map(({ id }) => id),
            note,
          )
        }
      }
    })

    test('what a repair could not bring back comes back with a backup of the same content', async () => {
      const store = new MemoryStore()
      const repository = await initRepository(store, options)
      const content = noise(new Random(2), 200_000)
      const { id } = await backUp(repository, content, undefined, 1000)
      const [pack = ''] = await store.list('packs/')
      const spoiled = Buffer.from(await store.get(pack))
      spoiled[70_000] = (spoiled[70_000] as number) ^ 1
      await replace(store, pack, spoiled)
      const found = await repository.check({ reads: () => true })
      assert.deepEqual(
        found.hit.map((hit) => [hit.id, hit.damagedBytes]),
        [[id, 65_536]],
      )
      const { lost, moved, recovered } = await repository.repair(found)
      assert.deepEqual([lost, moved, recovered], [1, 4, 0])
      assert.deepEqual(
        (await repository.check()).hit,
        found.hit.map((hit) => ({ ...hit, ranges: [{ ...hit.ranges[0], reason: MISSING }] })),
      )
      assert.ok((await backUp(repository, content, undefined, 2000)).storedBytes < 70_000)
      assert.ok((await repository.check({ reads: () => true })).isGood)
      assert.ok((await restore(repository, id)).equals(content))
    })

    test('a lost blob comes back from another copy of it', async () => {
      const store = new MemoryStore()
      const content = noise(new Random(3), 65_536)
      await (await initRepository(store, options)).close()
      // Two clients that do not know of each other's pack store the same.
      const writers = await Promise.all(
        [1, 2].map(async (moment) => {
          const one = await openRepository(store, options)
          const disks = [{ name: 'sda', size: content.length }]
          return one.begin({ machine: 'vm1', moment, kind: 'full', disks })
        }),
      )
      for (const writer of writers) await writer.disk(0).write(0, content.length, content, 0)
      for (const writer of writers) await writer.finish()
      const packs = await store.list('packs/')
      assert.equal(packs.length, 2)
      for (const pack of packs) {
        const copy = await copyOf(store)
        const spoiled = Buffer.from(await copy.get(pack))
        spoiled[5000] = (spoiled[5000] as number) ^ 1
        await replace(copy, pack, spoiled)
        const repository = await openRepository(copy, options)
        const { lost, recovered } = await repository.repair(await repository.check({ reads: () => true }))
        assert.deepEqual([lost, recovered], [0, 1])
        assert.ok((await repository.check({ reads: () => true })).isGood)
        for (const { id } of await repository.backups()) assert.ok((await restore(repository, id)).equals(content))
      }
    })
  })
}

const MISSING = 'its chunk is in no pack: packs are missing'
