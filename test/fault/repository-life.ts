// A short life of a repository with two clients and a pruner in it, of which one request goes wrong; and what must be true
// afterwards, whatever went wrong: what was reported done is whole, what is visible is whole, and the next pruning and check find nothing amiss.

import assert from 'node:assert/strict'
import crypto from 'node:crypto'
import { Random } from '../../src/base/random.ts'
import { isBlockError } from '../../src/block/error.ts'
import { SimulatedHost } from '../../src/host/simulated.ts'
import {
  initRepository,
  openRepository,
  type Repository,
  type RepositoryOptions,
} from '../../src/repository/repository.ts'
import type { ObjectStore } from '../../src/repository/store.ts'
import { MemoryStore } from '../../src/repository/stores/memory.ts'
import { TableFolder } from '../../src/repository/table-folder.ts'
import { changeSome, inline, noise, restore } from '../support/backups.ts'
import { FaultStore, type StoreFault } from '../support/fault-store.ts'

/** What the client does whose request goes wrong. */
export type Act = 'backup' | 'prune' | 'check' | 'copy' | 'repair'
export const ACTS: readonly Act[] = ['backup', 'prune', 'check', 'copy', 'repair']

export interface Life {
  readonly seed: number
  readonly act: Act
  readonly fault: StoreFault
  readonly faultAt: number
}

const SIZE = 96 * 1024

/** Every other life has its index on disk but for a few blobs. */
function optionsOf(seed: number): RepositoryOptions {
  if (seed % 2 === 1) return inline()
  const host = new SimulatedHost()
  return { ...inline(), tables: (id) => ({ folder: new TableFolder(host, `/tables/${id}`), memoryBlobs: 5 }) }
}

/** Ids of the backups that were reported done, and were not given up since, with what they hold. */
type Done = Map<string, string>

const digestOf = (bytes: Uint8Array): string => crypto.hash('sha256', bytes, 'hex')

/** Lives it; true when the request that was to go wrong was met at all. Throws what is not as it must be. */
export async function live(life: Life): Promise<boolean> {
  const options = optionsOf(life.seed)
  const random = new Random(life.seed)
  const store = new MemoryStore()
  const done: Done = new Map()
  const content = noise(random, SIZE)
  await prepare(store, options, random, content, done)
  const target = new MemoryStore('target')
  await initRepository(target, options)
  if (life.act === 'repair') await spoilIndex(store)
  // What goes wrong goes wrong in one client, on either side of a copy.
  const isTarget = life.act === 'copy' && random.chance(0.5)
  const faulty = new FaultStore(isTarget ? target : store, new Random(life.seed + 1))
  faulty.fault = life.fault
  faulty.faultAt = life.faultAt
  const others = Array.from({ length: 2 }, (_, i) => new FaultStore(store, new Random(life.seed + 2 + i)))
  const work = [
    (): Promise<unknown> =>
      actOn(life.act, faulty, isTarget ? store : target, isTarget, { options, random, content, done }),
    () => backUpSome(others[0] as ObjectStore, options, new Random(life.seed + 9), Buffer.from(content), done),
    () => pruneSome(others[1] as ObjectStore, options, new Random(life.seed + 8), done, life.act === 'prune'),
  ]
  const outcomes = await Promise.allSettled(work.map((each) => each()))
  for (const outcome of outcomes) if (outcome.status === 'rejected') mustBeOrderly(outcome.reason)
  for (const each of [faulty, ...others]) await each.settled()
  await isWhole(store, options, done, true)
  await isWhole(target, options, new Map(), false)
  await tidiesUp(store, options, done)
  return faulty.requests >= life.faultAt
}

/** Three backups, of which one is forgotten, and rubbish of a fourth. */
async function prepare(
  store: ObjectStore,
  options: RepositoryOptions,
  random: Random,
  content: Buffer,
  done: Done,
): Promise<void> {
  const repository = await initRepository(store, options)
  const ids: string[] = []
  for (let i = 0; i < 3; i++) {
    if (i > 0) changeSome(content, random, 3, 16_384)
    ids.push(await backUpWhole(repository, content, 1000 + i, done))
  }
  const forgotten = random.pick(ids)
  await repository.forget(forgotten)
  done.delete(forgotten)
  const writer = await repository.begin(requestOf(2000))
  await writer.disk(0).write(0, SIZE, noise(random, SIZE), 0)
  await writer.store()
  await writer.abort()
}

const requestOf = (moment: number) => ({
  machine: 'vm1',
  moment,
  kind: 'full' as const,
  disks: [{ name: 'sda', size: SIZE }],
})

/** Counts as done when it has been reported so. */
async function backUpWhole(repository: Repository, content: Buffer, moment: number, done: Done): Promise<string> {
  const digest = digestOf(content)
  const writer = await repository.begin(requestOf(moment))
  try {
    await writer.disk(0).write(0, SIZE, content, 0)
    const { id } = await writer.finish({ labels: { digest } })
    done.set(id, digest)
    return id
  } catch (error) {
    await writer.abort()
    throw error
  }
}

async function backUpSome(
  store: ObjectStore,
  options: RepositoryOptions,
  random: Random,
  content: Buffer,
  done: Done,
): Promise<void> {
  const repository = await openRepository(store, options)
  const parent = random.pick(await repository.backups())
  const before = await restore(repository, parent.id)
  const changes = changeSome(before, random, 3, 12_288)
  const writer = await repository
    .begin({
      ...requestOf(random.between(3000, 9000)),
      kind: 'incremental',
      disks: [{ name: 'sda', size: SIZE, parent: { backup: parent.id, disk: 'sda' } }],
    })
    .catch((error: unknown) => {
      // Another has forgotten it since it was listed.
      if (isBlockError(error, 'not-found')) return undefined
      throw error
    })
  if (writer === undefined) return void (await backUpWhole(repository, content, 9500, done))
  try {
    for (const { offset, length } of changes) await writer.disk(0).write(offset, length, before, offset)
    const { id } = await writer.finish({ labels: { digest: digestOf(before) } })
    done.set(id, digestOf(before))
  } catch (error) {
    await writer.abort()
    throw error
  }
}

async function pruneSome(
  store: ObjectStore,
  options: RepositoryOptions,
  random: Random,
  done: Done,
  isRival: boolean,
): Promise<void> {
  const repository = await openRepository(store, options)
  const victim = random.pick(await repository.backups()).id
  if (random.chance(0.7)) {
    // From the moment that it is asked for, nobody may count on it.
    done.delete(victim)
    await repository.forget(victim)
  }
  try {
    // Now and then it waits for nobody, as though all others had been silent: then they fail, and nothing else.
    await repository.prune({ repackBelow: random.pick([0, 0.7, 1]), ...(random.chance(0.3) ? { leaseMs: 0 } : {}) })
  } catch (error) {
    if (!isRival || !isBlockError(error, 'busy')) throw error
  }
}

async function actOn(
  act: Act,
  store: ObjectStore,
  other: ObjectStore,
  isTarget: boolean,
  {
    options,
    random,
    content,
    done,
  }: { readonly options: RepositoryOptions; readonly random: Random; readonly content: Buffer; readonly done: Done },
): Promise<void> {
  const repository = await openRepository(store, options)
  switch (act) {
    case 'backup': {
      const changed = Buffer.from(content)
      changeSome(changed, random, 4, 20_000)
      return void (await backUpWhole(repository, changed, 5000, done))
    }
    case 'prune':
      return void (await repository.prune({ repackBelow: 0.9, ...(random.chance(0.3) ? { leaseMs: 0 } : {}) }))
    case 'check': {
      const report = await repository.check({ reads: () => true })
      return assert.ok(report.isGood, `a check beside prunings finds ${JSON.stringify(report)}`)
    }
    case 'copy': {
      const second = await openRepository(other, options)
      await (isTarget ? second.copyTo(repository) : repository.copyTo(second))
      return
    }
    case 'repair':
      return void (await repository.repair(await repository.check({ reads: () => true })))
  }
}

/** One flipped bit in an index: nothing is lost by it. */
async function spoilIndex(store: ObjectStore): Promise<void> {
  const [key = ''] = await store.list('index/')
  const bytes = Buffer.from(await store.get(key))
  bytes[30] = (bytes[30] as number) ^ 1
  await store.remove(key)
  await store.put(key, [bytes])
}

/** What a client may hear: the injected failure, and what others do to it. Nothing else, and no assertion. */
function mustBeOrderly(error: unknown): void {
  const isInjected = isBlockError(error, 'io') && error.message.includes('injected')
  const isOvertaken = ['timeout', 'not-found', 'busy'].some((kind) => isBlockError(error) && error.kind === kind)
  // A read of a backup that was forgotten meanwhile may find its blobs gone.
  const isGone =
    isBlockError(error, 'corrupt') && /gone or cut short|is in no pack|nothing is removed/.test(error.message)
  if (!isInjected && !isOvertaken && !isGone) throw error
}

/** All that was reported done is there, and all that is there is whole and is what its writer said. */
async function isWhole(
  store: ObjectStore,
  options: RepositoryOptions,
  done: Done,
  mustBeThere: boolean,
): Promise<void> {
  const repository = await openRepository(store, options)
  const { backups, damaged } = await repository.list()
  assert.deepEqual(damaged, [])
  const visible = new Set(backups.map(({ id }) => id))
  if (mustBeThere) for (const id of done.keys()) assert.ok(visible.has(id), `${id} was reported done and is gone`)
  for (const { id, labels } of backups) {
    const bytes = await restore(repository, id)
    assert.equal(digestOf(bytes), labels['digest'], `${id} holds something else`)
    const known = done.get(id)
    assert.ok(known === undefined || known === labels['digest'])
  }
}

/** When all others are gone, one pruning leaves nothing but what the backups need, and a check finds nothing. */
async function tidiesUp(store: ObjectStore, options: RepositoryOptions, done: Done): Promise<void> {
  const repository = await openRepository(store, options)
  await repository.prune({ leaseMs: 0 })
  await repository.repair(await repository.check({ reads: () => true }))
  const report = await repository.prune({ leaseMs: 0, repackBelow: 1 })
  assert.equal(report.waitingPacks, 0)
  for (const prefix of ['sessions/', 'marks/', 'forgotten/']) assert.deepEqual(await store.list(prefix), [], prefix)
  const found = await repository.check({ reads: () => true })
  assert.ok(found.isGood, JSON.stringify(found))
  assert.equal((await repository.stats()).unusedBytes, 0)
  await isWhole(store, options, done, true)
}
