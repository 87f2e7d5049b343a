import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { backUp, beginFull, failsWith, initInline, noise, openInline, restore } from '../../test/support/backups.ts'
import { Random } from '../base/random.ts'
import type { Repository } from './repository.ts'
import type { ObjectStore } from './store.ts'
import { MemoryStore } from './stores/memory.ts'

const KIB = 1024
const MIB = 1024 * KIB

async function bytesIn(store: ObjectStore, prefix = 'packs/'): Promise<number> {
  let bytes = 0
  for (const key of await store.list(prefix)) bytes += (await store.get(key)).length
  return bytes
}

async function isWhole(repository: Repository, id: string, content: Buffer): Promise<void> {
  assert.ok((await restore(repository, id)).equals(content), `${id} restores`)
  const report = await repository.verify(id)
  assert.ok(report.isGood, JSON.stringify(report))
}

suite('prune', () => {
  test('of two backups one is forgotten, and exactly what only it needed goes', async () => {
    const store = new MemoryStore()
    const repository = await initInline(store)
    const random = new Random(1)
    const shared = noise(random, 4 * MIB)
    const first = Buffer.concat([shared, noise(random, 8 * MIB)])
    const second = Buffer.concat([shared, noise(random, 2 * MIB)])
    const one = await backUp(repository, first, undefined, 1000)
    const two = await backUp(repository, second, undefined, 2000)
    const nothing = await repository.prune()
    assert.deepEqual([nothing.removedPacks, nothing.repackedPacks], [0, 0])
    await repository.forget(one.id)
    assert.deepEqual(
      (await repository.backups()).map(({ id }) => id),
      [two.id],
    )
    await failsWith('not-found', () => repository.openBackup(one.id), /has no backup/)
    await failsWith('not-found', () => repository.forget(one.id), /has no backup/)
    const planned = await repository.prune({ dryRun: true })
    assert.deepEqual([planned.removedPacks, planned.repackedPacks], [0, 1])
    assert.ok(planned.removedBytes > 8 * MIB && planned.removedBytes < 8.1 * MIB)
    const steps: [number, number][] = []
    const report = await repository.prune({ progress: (done, total) => steps.push([done, total]) })
    assert.equal(report.removedPacks, 1)
    // One backup, looked at to plan and to sweep, and one pack.
    assert.deepEqual(steps.at(-1), [3, 3])
    assert.equal(report.waitingPacks, 0)
    assert.equal(report.removedBytes - report.repackedBytes, planned.removedBytes)
    const left = await bytesIn(store)
    assert.ok(left > 6 * MIB && left < 6.1 * MIB, `${left}`)
    await isWhole(repository, two.id, second)
    await isWhole(await openInline(store), two.id, second)
    for (const prefix of ['sessions/', 'marks/', 'forgotten/']) assert.deepEqual(await store.list(prefix), [])
    assert.equal((await store.list('backups/')).length, 1)
    assert.ok((await repository.check({ reads: () => true })).isGood)
  })

  test('rubbish of an interrupted backup goes, and of a backup under way stays', async () => {
    const store = new MemoryStore()
    const repository = await initInline(store)
    const content = noise(new Random(2), 40 * MIB)
    const doomed = await beginFull(repository, [{ name: 'sda', size: content.length }])
    await doomed.disk(0).write(0, content.length, content, 0)
    const other = await openInline(store)
    const early = await other.prune()
    assert.deepEqual([early.removedPacks, early.waitingPacks], [0, 0])
    const info = await doomed.finish()
    await isWhole(other, info.id, content)
    const again = await beginFull(repository, [{ name: 'sda', size: content.length }])
    await again.disk(0).write(0, content.length, noise(new Random(3), content.length), 0)
    await again.abort()
    assert.ok((await bytesIn(store)) > 56 * MIB)
    assert.ok((await other.prune()).removedPacks >= 1)
    assert.ok((await bytesIn(store)) < 41 * MIB)
    await isWhole(repository, info.id, content)
  })

  test('what a backup under way found in the repository stays until it ends, also when all else has forgotten it', async () => {
    const store = new MemoryStore()
    const repository = await initInline(store)
    const content = noise(new Random(4), 3 * MIB)
    const old = await backUp(repository, content, undefined, 1000)
    const writer = await beginFull(repository, [{ name: 'sda', size: content.length }])
    await writer.disk(0).write(0, content.length, content, 0)
    const pruner = await openInline(store)
    await pruner.forget(old.id)
    const waits = await pruner.prune()
    assert.deepEqual([waits.removedPacks, waits.waitingPacks], [0, 1])
    assert.match(waits.waitingFor[0] ?? '', new RegExp(`${writer.id} of process`))
    // Who begins now does not rely on the marked pack.
    const late = await backUp(await openInline(store), content, undefined, 3000)
    assert.ok(late.storedBytes > 3 * MIB)
    assert.equal((await pruner.prune()).removedPacks, 0)
    const info = await writer.finish()
    assert.equal(info.storedBytes, 0)
    // Both are whole, whichever copy is kept.
    await pruner.prune()
    await pruner.prune()
    assert.ok((await bytesIn(store)) < 3.1 * MIB)
    await isWhole(pruner, info.id, content)
    await isWhole(repository, late.id, content)
  })

  test('the parent of an incremental under way stays until that ends', async () => {
    const store = new MemoryStore()
    const repository = await initInline(store)
    const content = noise(new Random(5), 3 * MIB)
    const parent = await backUp(repository, content)
    const disks = [{ name: 'sda', size: content.length, parent: { backup: parent.id, disk: 'sda' } }]
    const writer = await repository.begin({ machine: 'vm1', moment: 2000, kind: 'incremental', disks })
    const pruner = await openInline(store)
    await pruner.forget(parent.id)
    await pruner.prune()
    await pruner.prune()
    noise(new Random(6), 4096).copy(content, 8192)
    await writer.disk(0).write(8192, 4096, content, 8192)
    const info = await writer.finish()
    await pruner.prune()
    assert.equal((await store.list('backups/')).length, 1)
    await isWhole(await openInline(store), info.id, content)
    await failsWith(
      'not-found',
      () => repository.begin({ machine: 'vm1', moment: 3000, kind: 'incremental', disks }),
      /has no backup/,
    )
    assert.deepEqual(await store.list('sessions/'), [])
  })

  test('what an incremental has from its parent stays, also in a pack that was marked before both', async () => {
    const store = new MemoryStore()
    const repository = await initInline(store)
    const content = noise(new Random(12), 3 * MIB)
    const old = await backUp(repository, content, undefined, 1000)
    const early = await beginFull(repository, [{ name: 'sda', size: content.length }])
    await early.disk(0).write(0, content.length, content, 0)
    const pruner = await openInline(store)
    await pruner.forget(old.id)
    assert.equal((await pruner.prune()).waitingPacks, 1)
    const parent = await early.finish()
    // It knows the mark, and relies on the pack all the same: through its parent, which is forgotten meanwhile.
    const disks = [{ name: 'sda', size: content.length, parent: { backup: parent.id, disk: 'sda' } }]
    const late = await openInline(store)
    const writer = await late.begin({ machine: 'vm1', moment: 3000, kind: 'incremental', disks })
    await pruner.forget(parent.id)
    await pruner.prune()
    await pruner.prune()
    const info = await writer.finish()
    await pruner.prune()
    assert.equal((await store.list('backups/')).length, 1)
    await isWhole(await openInline(store), info.id, content)
  })

  test('who is silent for too long is given up: its backup fails as that and never becomes visible', async () => {
    let nowMs = 1_000_000
    const store = new MemoryStore('memory', () => nowMs)
    const repository = await initInline(store)
    const content = noise(new Random(7), 2 * MIB)
    const old = await backUp(repository, content)
    const writer = await beginFull(repository, [{ name: 'sda', size: content.length }])
    await writer.disk(0).write(0, content.length, content, 0)
    const pruner = await openInline(store)
    await pruner.forget(old.id)
    nowMs += 29 * 60_000
    assert.equal((await pruner.prune()).waitingPacks, 1)
    nowMs += 2 * 60_000
    const report = await pruner.prune()
    assert.deepEqual(report.fenced, [writer.id])
    assert.equal(report.removedPacks, 1)
    await failsWith('timeout', () => writer.finish(), /was silent for so long/)
    await writer.abort()
    assert.deepEqual(await pruner.backups(), [])
    assert.deepEqual((await pruner.list()).damaged, [])
    assert.ok((await pruner.check()).isGood)
    nowMs += 31 * 24 * 3_600_000
    await pruner.prune()
    assert.deepEqual(await store.list('backups/'), [])
  })

  test('a reader that was open before goes on while its backup’s blobs move', async () => {
    const store = new MemoryStore()
    const repository = await initInline(store)
    const random = new Random(8)
    const shared = noise(random, 2 * MIB)
    const old = await backUp(repository, Buffer.concat([shared, noise(random, 6 * MIB)]))
    const info = await backUp(repository, shared, undefined, 2000)
    const reader = await repository.openBackup(info.id)
    const device = reader.disks[0]?.device
    assert.ok(device !== undefined)
    const into = Buffer.alloc(2 * MIB)
    await device.read(0, 4096, into, 0)
    const pruner = await openInline(store)
    await pruner.forget(old.id)
    assert.equal((await pruner.prune()).repackedPacks, 1)
    await device.read(0, 2 * MIB, into, 0)
    assert.ok(into.equals(shared))
    await reader.close()
  })

  test('nothing is removed while a backup cannot be read, until that is forgotten', async () => {
    const store = new MemoryStore()
    const repository = await initInline(store)
    const one = await backUp(repository, noise(new Random(9), MIB), undefined, 1000)
    const two = await backUp(repository, noise(new Random(10), MIB), undefined, 2000)
    await repository.forget(one.id)
    const manifest = await store.get(`backups/${two.id}`)
    await store.remove(`backups/${two.id}`)
    await store.put(`backups/${two.id}`, [manifest.subarray(0, 50)])
    await failsWith(
      'corrupt',
      () => repository.prune(),
      /nothing is removed while a backup cannot be read.*repo forget/,
    )
    assert.ok((await bytesIn(store)) > 2 * MIB)
    await repository.forget(two.id)
    assert.equal((await repository.prune()).removedPacks, 2)
  })

  test('one pruning at a time, and one that died does not hinder the next for ever', async () => {
    let nowMs = 0
    const store = new MemoryStore('memory', () => nowMs)
    const repository = await initInline(store)
    await backUp(repository, Buffer.alloc(8192, 1))
    // A pruning's session as one that was killed leaves it.
    const one = repository.prune()
    const left: [string, Uint8Array][] = []
    for (const key of await store.list('sessions/')) left.push([key, await store.get(key)])
    await one
    for (const [key, bytes] of left) await store.put(key, [bytes])
    await failsWith('busy', () => repository.prune(), /is being pruned by process/)
    nowMs += 31 * 60_000
    await repository.prune()
    assert.deepEqual(await store.list('sessions/'), [])
  })

  test('many small packs and indexes become few', async () => {
    const store = new MemoryStore()
    const repository = await initInline(store)
    const random = new Random(11)
    const content = noise(random, MIB)
    let info = await backUp(repository, content)
    for (let day = 0; day < 70; day++) {
      const offset = 4096 * random.below(256)
      random.fill(content.subarray(offset, offset + 4096))
      info = await backUp(repository, content, { id: info.id, changes: [{ offset, length: 4096 }] }, 2000 + day)
    }
    assert.ok((await store.list('packs/')).length > 64)
    await repository.prune()
    assert.ok((await store.list('packs/')).length < 4, String((await store.list('packs/')).length))
    assert.ok((await store.list('index/')).length < 5, String((await store.list('index/')).length))
    for (const { id } of await repository.backups()) assert.ok((await repository.verify(id)).isGood)
    await isWhole(await openInline(store), info.id, content)
  })

  test('a part that is none is refused', async () => {
    const repository = await initInline(new MemoryStore())
    await failsWith('invalid-argument', () => repository.prune({ repackBelow: 1.5 }), /from 0 to 1/)
    await failsWith('invalid-argument', () => repository.prune({ keep: {} }), /would forget every backup/)
    await failsWith('invalid-argument', () => repository.prune({ keep: { last: -1 } }), /keep-last/)
  })
})
