// What a repository refuses: stores, manifests, requests and runs that cannot be right.

import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { BlockError } from '../../src/block/error.ts'
import { backUp, beginFull, failsWith, initInline, inline, openInline, restore } from '../support/backups.ts'
import { initRepository, openRepository } from '../../src/repository/repository.ts'
import { seal } from '../../src/repository/sealed.ts'
import { InlineSqueezer } from '../../src/repository/squeezer.ts'
import { MemoryStore } from '../../src/repository/stores/memory.ts'

async function madeStore(): Promise<MemoryStore> {
  const store = new MemoryStore()
  await initInline(store)
  return store
}

suite('repository: what it refuses', () => {
  test('opening what is no repository, or making one twice, says what to do', async () => {
    const store = new MemoryStore()
    await failsWith(
      'not-found',
      () => openRepository(store),
      /memory is no repository: make one with `varve repo init memory`/,
    )
    const { id } = await initInline(store)
    await failsWith('exists', () => initRepository(store), /use it as it is/)
    assert.equal((await openInline(store)).id, id)
  })

  test('a repository of another version is refused', async () => {
    const store = new MemoryStore()
    await store.put('config', [seal({ format: 3, id: 'x' })])
    await failsWith('invalid-format', () => openInline(store), /version 3; this Varve reads version 2/)
    const other = new MemoryStore()
    await other.put('config', [seal({ format: 2, id: 'x', chunk: 131072 })])
    await failsWith('invalid-format', () => openInline(other), /not as this Varve expects it: see "id"/)
    const whole = JSON.parse(
      Buffer.from(await (await madeStore()).get('config'))
        .toString()
        .split('\n')[0] as string,
    ) as object
    for (const [field, value] of Object.entries({
      chunk: 131_072,
      granule: 512,
      fanout: 32,
      digest: 'md5',
      compression: '',
      encryption: 'rot13',
    })) {
      const changed = new MemoryStore()
      await changed.put('config', [seal({ ...whole, [field]: value })])
      await failsWith('invalid-format', () => openInline(changed), new RegExp(`see "${field}"`))
    }
  })

  test('a manifest with a field that cannot be right is refused by the name of the field', async () => {
    const store = new MemoryStore()
    const repository = await initInline(store)
    const info = await backUp(repository, Buffer.alloc(8192, 1))
    const [disk] = info.disks
    const changes: [string, object][] = [
      ['see "moment"', { moment: -1 }],
      ['see "kind"', { kind: 'differential' }],
      ['see "disks"', { disks: [{ ...disk, root: 'xyz' }] }],
      ['see "disks"', { disks: [{ ...disk, size: 2 ** 50 }] }],
      ['see "disks"', { disks: [{ ...disk, parent: { backup: '../config', disk: 'sda' } }] }],
      ['see "labels"', { labels: { a: 1 } }],
      ['wrong levels for disk sda', { disks: [{ ...disk, levels: 3 }] }],
      ['calls itself', { id: '20260101T000000000Z-00000000' }],
      ['version 3', { format: 3 }],
    ]
    for (const [says, change] of changes) {
      await store.remove(`backups/${info.id}`)
      await store.put(`backups/${info.id}`, [seal({ ...info, ...change })])
      assert.match((await repository.list()).damaged[0]?.reason ?? '', new RegExp(says))
      await assert.rejects(repository.openBackup(info.id), new RegExp(says))
    }
  })

  test('runs that are misplaced, out of order or outside fail, and the rest of the backup goes on', async () => {
    const repository = await initInline(new MemoryStore())
    const writer = await beginFull(repository, [{ name: 'sda', size: 100_000 }])
    const disk = writer.disk(0)
    const buffer = Buffer.alloc(100_000, 3)
    await failsWith('invalid-argument', () => disk.write(100, 4096, buffer, 0), /multiples of 4096/)
    await failsWith('invalid-argument', () => disk.zero(0, 100), /multiples of 4096/)
    await failsWith('out-of-range', () => disk.write(98_304, 4096, buffer, 0), /outside the 100000 bytes/)
    await failsWith('out-of-range', () => disk.write(Number.NaN, 4096, buffer, 0), /outside/)
    await disk.write(8192, 4096, buffer, 0)
    await failsWith('invalid-argument', () => disk.write(4096, 8192, buffer, 0), /ascend/)
    await disk.write(98_304, 1696, buffer, 0)
    const restored = await restore(repository, (await writer.finish()).id)
    const expected = Buffer.alloc(100_000)
    expected.fill(3, 8192, 12_288).fill(3, 98_304)
    assert.ok(restored.equals(expected))
  })

  test('a request that cannot be right is refused before anything is stored', async () => {
    const repository = await initInline(new MemoryStore())
    const base = { machine: 'vm1', moment: 1, kind: 'full' as const, disks: [{ name: 'sda', size: 4096 }] }
    await failsWith('invalid-argument', () => repository.begin({ ...base, machine: '' }), /name of its machine/)
    await failsWith('invalid-argument', () => repository.begin({ ...base, moment: 1.5 }), /no moment/)
    await failsWith('invalid-argument', () => repository.begin({ ...base, disks: [] }), /at least one disk/)
    await failsWith(
      'invalid-argument',
      () => repository.begin({ ...base, disks: [...base.disks, ...base.disks] }),
      /twice/,
    )
    await failsWith('invalid-argument', () => beginFull(repository, [{ name: 'sda', size: -1 }]), /not -1/)
    const { id } = await backUp(repository, Buffer.alloc(8192, 1))
    const child = (backup: string, disk: string, size: number) =>
      repository.begin({ ...base, disks: [{ name: 'sda', size, parent: { backup, disk } }] })
    await failsWith('not-found', () => child(id, 'sdb', 8192), /no disk sdb, only sda/)
    await failsWith('not-found', () => child('20260101T000000000Z-00000000', 'sda', 8192), /no backup 2026/)
    await failsWith('not-found', () => child('../config', 'sda', 8192), /no backup/)
    await failsWith('unsupported', () => child(id, 'sda', 5000), /without a parent/)
    await failsWith('not-found', () => repository.openBackup('x'), /`varve backups` lists/)
  })

  test('a finished or aborted backup takes no more', async () => {
    const repository = await initInline(new MemoryStore())
    const writer = await beginFull(repository, [{ name: 'sda', size: 4096 }])
    await writer.finish()
    await failsWith('closed', () => writer.disk(0).zero(0, 4096), /done/)
    await failsWith('closed', () => writer.finish(), /done/)
    await writer.abort()
    assert.equal((await repository.backups()).length, 1)
    const other = await beginFull(repository, [{ name: 'sda', size: 4096 }])
    await other.abort()
    await failsWith('cancelled', () => other.disk(0).write(0, 4096, Buffer.alloc(4096), 0), /given up/)
    await failsWith('cancelled', () => other.finish(), /given up/)
    assert.equal((await repository.backups()).length, 1)
  })

  test('closing a repository ends its squeezer', async () => {
    let closed = 0
    class Watched extends InlineSqueezer {
      override async close(): Promise<void> {
        closed++
      }
    }
    await (await initRepository(new MemoryStore(), { squeezer: () => new Watched() })).close()
    assert.equal(closed, 1)
  })

  test('a client that may only add makes backups, and takes nothing away', async () => {
    const store = await madeStore()
    const adding = await openRepository(store, { ...inline(), appendOnly: true })
    const content = Buffer.alloc(8192, 3)
    const { id } = await backUp(adding, content)
    assert.ok((await restore(adding, id)).equals(content))
    assert.deepEqual(await store.list('sessions/'), [])
    await failsWith('permission', () => adding.forget(id), /open to add only: it does not put forgotten/)
    await adding.tag(id, { add: ['gold'] })
    await failsWith('permission', () => adding.tag(id, { remove: ['gold'] }), /does not remove tags/)
    const other = await openInline(store)
    await other.forget(id)
    await failsWith('permission', () => adding.prune(), /open to add only/)
    assert.equal((await store.list('backups/')).length, 1)
    await other.prune()
    assert.deepEqual(await store.list('backups/'), [])
  })

  test('a store that lets nobody remove anything takes backups all the same, and a pruning elsewhere tidies up', async () => {
    class Keeping extends MemoryStore {
      isKeeping = true
      override async remove(key: string): Promise<void> {
        if (this.isKeeping) throw new BlockError('permission', `${key} may not be removed`)
        return super.remove(key)
      }
    }
    const store = new Keeping()
    const repository = await initInline(store)
    const { id } = await backUp(repository, Buffer.alloc(8192, 3))
    assert.equal((await store.list('sessions/')).length, 1)
    await failsWith('permission', () => repository.prune(), /may not be removed/)
    store.isKeeping = false
    await repository.prune({ leaseMs: 0 })
    assert.deepEqual(await store.list('sessions/'), [])
    assert.ok((await repository.verify(id)).isGood)
  })
})
