import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { backUp, type Change, changeSome, initInline, openInline, restore } from '../../test/support/backups.ts'
import { Random, seedOfRun } from '../base/random.ts'
import { HOLE, ZERO } from '../block/device.ts'
import { isBlockError } from '../block/error.ts'
import { listExtents } from '../block/extents.ts'
import { type BackupInfo, type BackupWriter, initRepository, openRepository, type Repository } from './repository.ts'
import { InlineSqueezer } from './squeezer.ts'
import { MemoryStore } from './stores/memory.ts'

const KIB = 1024
const MIB = 1024 * KIB

async function fails(kind: string, work: () => unknown, says: RegExp): Promise<void> {
  await assert.rejects(
    async () => work(),
    (error) => {
      assert.ok(isBlockError(error, kind as 'io'), String(error))
      assert.match(error.message, says)
      return true
    },
  )
}

const noise = (random: Random, length: number): Buffer => {
  const bytes = Buffer.alloc(length)
  random.fill(bytes)
  return bytes
}

const full = (repository: Repository, disks: { name: string; size: number }[]): Promise<BackupWriter> =>
  repository.begin({ machine: 'vm1', moment: 1000, kind: 'full', disks })

suite('repository: backups restore byte for byte', () => {
  test('a full backup of a disk of any size, with holes and zeros, restores as it was', async () => {
    const repository = await initInline(new MemoryStore())
    const sizes = [
      0,
      1,
      4095,
      4096,
      4097,
      65_536,
      65_537,
      256 * KIB,
      256 * KIB + 1,
      16 * MIB,
      16 * MIB + 512,
      20 * MIB - 3,
    ]
    for (const size of sizes) {
      const content = noise(new Random(size), size)
      content.fill(0, Math.floor(size * 0.3), Math.floor(size * 0.6))
      const info = await backUp(repository, content)
      assert.ok((await restore(repository, info.id)).equals(content), `${size} bytes`)
      assert.ok((await repository.verify(info.id)).isGood)
    }
  })

  test('the size of the writes makes no difference to what is stored or restored', async () => {
    const random = new Random(8)
    const content = noise(random, 3 * MIB + 1000)
    const stored = new Set<string>()
    for (const piece of [4 * KIB, 12 * KIB, 64 * KIB, 1 * MIB, 4 * MIB]) {
      const repository = await initInline(new MemoryStore())
      const writer = await full(repository, [{ name: 'sda', size: content.length }])
      for (let at = 0; at < content.length; at += piece) {
        await writer.disk(0).write(at, Math.min(piece, content.length - at), content, at)
      }
      const info = await writer.finish()
      assert.ok((await restore(repository, info.id)).equals(content))
      stored.add(String(info.disks[0]?.root))
    }
    assert.equal(stored.size, 1)
  })

  test('twenty incrementals in a row each restore at any time, also when others are gone, from a reopened repository', async (t) => {
    const random = new Random(seedOfRun())
    t.diagnostic(`VARVE_SEED=${random.seed}`)
    const store = new MemoryStore()
    let repository = await initInline(store)
    let content = noise(random, 3 * MIB + 5000)
    let info = await backUp(repository, content)
    const states: { info: BackupInfo; content: Buffer }[] = [{ info, content: Buffer.from(content) }]
    for (let i = 0; i < 20; i++) {
      // Grows or shrinks at times; what is new must be written, as a disk's bitmap says.
      let grown: Change[] = []
      if (random.chance(0.3)) {
        const size = random.chance(0.5) ? content.length + random.below(2 * MIB) : 4096 * random.between(1, 900)
        const old = content
        content = Buffer.alloc(size)
        old.copy(content)
        const from = old.length - (old.length % 4096)
        if (size > old.length) grown = [{ offset: from, length: size - from }]
      }
      const limit = grown[0]?.offset ?? content.length
      const changes = changeSome(
        content.subarray(0, limit),
        random,
        random.below(30),
        random.pick([4096, 40_000, 400_000]),
      )
      if (random.chance(0.2)) repository = await openInline(store)
      info = await backUp(repository, content, { id: info.id, changes: [...changes, ...grown] }, 2000 + i)
      states.push({ info, content: Buffer.from(content) })
      const any = random.pick(states)
      assert.ok((await restore(repository, any.info.id)).equals(any.content), `seed ${random.seed}, step ${i}`)
    }
    const kept = states.filter(() => random.chance(0.5))
    for (const state of states) if (!kept.includes(state)) await store.remove(`backups/${state.info.id}`)
    repository = await openInline(store)
    assert.deepEqual(
      (await repository.backups()).map(({ id }) => id),
      kept.map((state) => state.info.id),
    )
    for (const state of kept) {
      assert.ok((await restore(repository, state.info.id)).equals(state.content), `seed ${random.seed}`)
      assert.ok((await repository.verify(state.info.id)).isGood)
    }
  })

  test('disks of one machine are written in turns or at once, and each keeps its own content', async () => {
    const repository = await initInline(new MemoryStore())
    const random = new Random(12)
    const contents = [5 * MIB, 3 * MIB + 77, 9 * MIB].map((size) => noise(random, size))
    const writer = await full(
      repository,
      contents.map((content, i) => ({ name: `disk${i}`, size: content.length })),
    )
    const writeAll = async (content: Buffer, disk: number): Promise<void> => {
      for (let at = 0; at < content.length; at += 100 * KIB) {
        await writer.disk(disk).write(at, Math.min(100 * KIB, content.length - at), content, at)
      }
    }
    await Promise.all(contents.map(writeAll))
    const { id } = await writer.finish()
    for (const [i, content] of contents.entries()) assert.ok((await restore(repository, id, i)).equals(content))
  })

  test('a buffer may be used again as soon as its write is done', async () => {
    const repository = await initInline(new MemoryStore())
    const writer = await full(repository, [{ name: 'sda', size: 40 * MIB }])
    const buffer = Buffer.alloc(MIB)
    for (let i = 0; i < 40; i++) {
      await writer.disk(0).write(i * MIB, MIB, buffer.fill(i + 1), 0)
      buffer.fill(0xff)
    }
    const restored = await restore(repository, (await writer.finish()).id)
    for (let i = 0; i < 40; i++) assert.ok(restored.subarray(i * MIB, (i + 1) * MIB).every((byte) => byte === i + 1))
  })

  test('a disk that shrank and grew again does not show what it had before', async () => {
    const repository = await initInline(new MemoryStore())
    const content = Buffer.alloc(40 * MIB, 7)
    const first = await backUp(repository, content)
    const shrunk = await backUp(repository, content.subarray(0, 300 * KIB), { id: first.id, changes: [] })
    const grown = await backUp(repository, Buffer.alloc(70 * MIB), { id: shrunk.id, changes: [] })
    const expected = Buffer.alloc(70 * MIB)
    expected.fill(7, 0, 300 * KIB)
    assert.ok((await restore(repository, grown.id)).equals(expected))
    assert.ok((await restore(repository, first.id)).equals(content))
  })

  test('with threads of its own a repository stores and restores the same', async () => {
    const store = new MemoryStore()
    const threaded = await initRepository(store)
    const random = new Random(4)
    const content = noise(random, 18 * MIB + 100)
    const info = await backUp(threaded, content)
    assert.ok((await restore(threaded, info.id)).equals(content))
    assert.ok((await threaded.verify(info.id)).isGood)
    const same = await backUp(await openInline(store), content)
    assert.equal(same.disks[0]?.root, info.disks[0]?.root)
    await threaded.close()
  })
})

suite('repository: a backup as a device', () => {
  test('reads of any alignment and length agree with the content, in flight together', async (t) => {
    const random = new Random(seedOfRun())
    t.diagnostic(`VARVE_SEED=${random.seed}`)
    const repository = await initInline(new MemoryStore())
    const content = noise(random, 5 * MIB + 321)
    const first = await backUp(repository, content)
    const changes = changeSome(content, random, 200, 9000)
    const { id } = await backUp(repository, content, { id: first.id, changes })
    const device = (await repository.openBackup(id)).disks[0]?.device
    assert.ok(device !== undefined)
    const readOne = async (): Promise<void> => {
      const offset = random.below(content.length)
      const length = random.below(Math.min(content.length - offset, random.pick([100, 10_000, 3 * MIB])) + 1)
      const into = Buffer.alloc(length + 9, 1)
      await device.read(offset, length, into, 5)
      assert.ok(
        into.subarray(5, 5 + length).equals(content.subarray(offset, offset + length)),
        `${length} at ${offset}`,
      )
      assert.ok(
        into.subarray(0, 5).every((byte) => byte === 1) && into.subarray(5 + length).every((byte) => byte === 1),
      )
    }
    for (let round = 0; round < 20; round++) await Promise.all(Array.from({ length: 12 }, readOne))
  })

  test('it refuses writes, requests outside it, and everything after close', async () => {
    const repository = await initInline(new MemoryStore())
    const { id } = await backUp(repository, Buffer.alloc(8192, 1))
    const reader = await repository.openBackup(id)
    const device = reader.disks[0]?.device
    assert.ok(device !== undefined && !device.can.write)
    const buffer = Buffer.alloc(8192)
    await fails('read-only', () => device.write(0, 4096, buffer, 0, 0), /read-only/)
    await fails('read-only', () => device.zero(0, 4096, 0), /read-only/)
    await fails('read-only', () => device.trim(0, 4096, 0), /read-only/)
    await fails('out-of-range', () => device.read(4096, 8192, buffer, 0), /outside/)
    await reader.close()
    await fails('closed', () => device.read(0, 1, buffer, 0), /close/)
  })

  test('what was read a moment ago is answered within the call', async () => {
    const repository = await initInline(new MemoryStore())
    const content = noise(new Random(1), MIB)
    const device = (await repository.openBackup((await backUp(repository, content)).id)).disks[0]?.device
    const into = Buffer.alloc(10_000)
    await device?.read(100_000, 10_000, into, 0)
    into.fill(0)
    assert.equal(device?.read(100_000, 10_000, into, 0), undefined)
    assert.ok(into.equals(content.subarray(100_000, 110_000)))
  })

  test('its extents are exactly what was stored, whatever the size of the holes', async () => {
    const repository = await initInline(new MemoryStore())
    const size = 3 * 1024 * 1024 * MIB
    const writer = await full(repository, [{ name: 'sda', size }])
    const data = Buffer.alloc(8192, 1)
    const places = [0, 70 * MIB, 2 * 1024 * 1024 * MIB + 4096, size - 8192]
    for (const place of places) await writer.disk(0).write(place, 8192, data, 0)
    const { id } = await writer.finish()
    const device = (await repository.openBackup(id)).disks[0]?.device
    assert.ok(device !== undefined)
    const found = (await listExtents(device, 0, size)).filter(({ extent }) => extent === 0)
    assert.deepEqual(
      found,
      places.map((offset) => ({ offset, length: 8192, extent: 0 })),
    )
    assert.deepEqual(await listExtents(device, 4096, 8192), [
      { offset: 4096, length: 4096, extent: 0 },
      { offset: 8192, length: 4096, extent: HOLE | ZERO },
    ])
  })
})

suite('repository: what it stores', () => {
  test('the same content again costs a manifest and nothing else', async () => {
    const store = new MemoryStore()
    const repository = await initInline(store)
    const content = noise(new Random(2), 6 * MIB)
    await backUp(repository, content)
    const before = await store.list('')
    const second = await backUp(repository, content)
    assert.equal(second.storedBytes, 0)
    const third = await backUp(repository, content, { id: second.id, changes: [] })
    assert.equal(third.storedBytes, 0)
    assert.deepEqual((await store.list('')).sort(), [...before, `backups/${second.id}`, `backups/${third.id}`].sort())
  })

  test('zeros cost nothing', async () => {
    const repository = await initInline(new MemoryStore())
    const info = await backUp(repository, Buffer.alloc(30 * MIB))
    assert.equal(info.disks[0]?.root, null)
    assert.equal(info.storedBytes, 0)
  })

  test('random changes of 4 KiB on an old disk store less than two times the changed bytes', async () => {
    // The content of a 64 KiB is one number and zeros after it, so that the full backup is quick; its map is that of any data.
    const size = 256 * MIB
    const repository = await initInline(new MemoryStore())
    const random = new Random(20)
    const writer = await full(repository, [{ name: 'sda', size }])
    const region = Buffer.alloc(64 * KIB)
    for (let offset = 0; offset < size; offset += region.length) {
      region.writeDoubleLE(offset + 1)
      await writer.disk(0).write(offset, region.length, region, 0)
    }
    let parent = await writer.finish()
    const page = Buffer.alloc(4096)
    const incremental = async (share: number): Promise<number> => {
      const count = Math.round((size / 4096) * share)
      const places = new Set<number>()
      while (places.size < count) places.add(random.below(size / 4096))
      const next = await repository.begin({
        machine: 'vm1',
        moment: parent.moment + 1,
        kind: 'incremental',
        disks: [{ name: 'sda', size, parent: { backup: parent.id, disk: 'sda' } }],
      })
      for (const place of [...places].sort((a, b) => a - b))
        await next.disk(0).write(place * 4096, 4096, random.fill(page), 0)
      parent = await next.finish()
      assert.equal(parent.disks[0]?.changedBytes, count * 4096)
      return parent.storedBytes / (count * 4096)
    }
    assert.ok((await incremental(0.01)) < 1.2)
    assert.ok((await incremental(0.001)) < 1.5)
    // Seven changes: the ratio that is asked of this few leaves 64 KiB for the tops of maps.
    assert.ok((await incremental(0.0001)) < 3 + (64 * KIB) / (7 * 4096))
    // A history that has cut up three quarters of all 64 KiB, and what an incremental costs after it.
    for (let i = 0; i < 3; i++) await incremental(0.03)
    assert.ok((await incremental(0.01)) < 1.4)
    assert.ok((await incremental(0.001)) < 1.8)
  })

  test('text is stored compressed, random data as it is', async () => {
    const repository = await initInline(new MemoryStore())
    const text = Buffer.from('the layer of sediment that one year leaves behind\n'.repeat(40_000))
    assert.ok((await backUp(repository, text)).storedBytes < text.length / 10)
    const random = noise(new Random(6), 2 * MIB)
    const { storedBytes } = await backUp(repository, random)
    assert.ok(storedBytes > random.length && storedBytes < random.length * 1.01)
  })

  test('what an interrupted backup stored is not stored again', async () => {
    const store = new MemoryStore()
    const content = noise(new Random(5), 40 * MIB)
    const interrupted = await full(await initInline(store), [{ name: 'sda', size: content.length }])
    await interrupted.disk(0).write(0, content.length, content, 0)
    await interrupted.abort()
    assert.ok((await store.list('packs/')).length >= 1)
    assert.deepEqual(await store.list('backups/'), [])
    const repository = await openInline(store)
    const info = await backUp(repository, content)
    assert.ok(info.storedBytes < content.length - 15 * MIB, `${info.storedBytes}`)
    assert.ok((await restore(repository, info.id)).equals(content))
  })

  test('a repository finds its packs without any index', async () => {
    const store = new MemoryStore()
    const content = noise(new Random(5), 3 * MIB)
    const { id } = await backUp(await initInline(store), content)
    for (const key of await store.list('index/')) await store.remove(key)
    const repository = await openInline(store)
    assert.ok((await restore(repository, id)).equals(content))
    assert.ok((await repository.verify(id)).isGood)
  })

  test('its figures add up', async () => {
    const store = new MemoryStore()
    const repository = await initInline(store)
    await backUp(repository, noise(new Random(5), 3 * MIB))
    await backUp(repository, Buffer.alloc(5 * MIB))
    let stored = 0
    for (const key of await store.list('')) stored += (await store.get(key)).length
    assert.deepEqual(await repository.stats(), {
      backups: 2,
      logicalBytes: 8 * MIB,
      storedBytes: stored,
      packs: 1,
      blobs: 48 + 12 + 1,
    })
  })
})

suite('repository: several at once', () => {
  test('two repositories in one process and two backups in one repository do not disturb each other', async () => {
    const store = new MemoryStore()
    const one = await initInline(store)
    const two = await openInline(store)
    const random = new Random(3)
    const shared = noise(random, 20 * MIB)
    const contents = [0, 1, 2, 3].map((i) => {
      const content = Buffer.from(shared)
      random.fill(content.subarray(i * MIB, (i + 1) * MIB))
      return content
    })
    const infos = await Promise.all(contents.map((content, i) => backUp(i % 2 === 0 ? one : two, content)))
    for (const [i, info] of infos.entries()) {
      const content = contents[i] as Buffer
      assert.ok((await restore(i % 2 === 0 ? two : one, info.id)).equals(content))
      assert.ok((await two.verify(info.id)).isGood)
    }
  })

  test('a backup does not rely on chunks of another that fails later', async () => {
    const store = new MemoryStore()
    const repository = await initInline(store)
    const content = noise(new Random(9), 5 * MIB)
    const doomed = await full(repository, [{ name: 'sda', size: content.length }])
    await doomed.disk(0).write(0, content.length, content, 0)
    const info = await backUp(repository, content)
    await doomed.abort()
    assert.ok((await restore(await openInline(store), info.id)).equals(content))
  })

  test('backups are listed by their moment, newest last, and one that is damaged is named', async () => {
    const store = new MemoryStore()
    const repository = await initInline(store)
    const infos: BackupInfo[] = []
    for (const moment of [5000, 1_700_000_000_000, 3000])
      infos.push(await backUp(repository, Buffer.alloc(4096, 1), undefined, moment))
    assert.deepEqual(
      (await repository.backups()).map(({ moment }) => moment),
      [3000, 5000, 1_700_000_000_000],
    )
    const victim = `backups/${infos[0]?.id}`
    const bytes = await store.get(victim)
    await store.remove(victim)
    await store.put(victim, [bytes.subarray(0, 100)])
    const list = await repository.list()
    assert.equal(list.backups.length, 2)
    assert.deepEqual(
      list.damaged.map(({ id }) => id),
      [infos[0]?.id],
    )
    assert.match(list.damaged[0]?.reason ?? '', /damaged/)
  })
})

suite('repository: what it refuses', () => {
  test('opening what is no repository, or making one twice, says what to do', async () => {
    const store = new MemoryStore()
    await fails(
      'not-found',
      () => openRepository(store),
      /memory is no repository: make one with `varve repo init memory`/,
    )
    const { id } = await initInline(store)
    await fails('exists', () => initRepository(store), /use it as it is/)
    assert.equal((await openInline(store)).id, id)
  })

  test('a repository of another version is refused', async () => {
    const { seal } = await import('./sealed.ts')
    const store = new MemoryStore()
    await store.put('config', [seal({ format: 2, id: 'x' })])
    await fails('invalid-format', () => openInline(store), /version 2; this Varve reads version 1/)
    const other = new MemoryStore()
    await other.put('config', [seal({ format: 1, id: 'x', chunk: 131072 })])
    await fails('invalid-format', () => openInline(other), /not as this Varve expects it/)
  })

  test('runs that are misplaced, out of order or outside fail, and the rest of the backup goes on', async () => {
    const repository = await initInline(new MemoryStore())
    const writer = await full(repository, [{ name: 'sda', size: 100_000 }])
    const disk = writer.disk(0)
    const buffer = Buffer.alloc(100_000, 3)
    await fails('invalid-argument', () => disk.write(100, 4096, buffer, 0), /multiples of 4096/)
    await fails('invalid-argument', () => disk.zero(0, 100), /multiples of 4096/)
    await fails('out-of-range', () => disk.write(98_304, 4096, buffer, 0), /outside the 100000 bytes/)
    await fails('out-of-range', () => disk.write(Number.NaN, 4096, buffer, 0), /outside/)
    await disk.write(8192, 4096, buffer, 0)
    await fails('invalid-argument', () => disk.write(4096, 8192, buffer, 0), /ascend/)
    await disk.write(98_304, 1696, buffer, 0)
    const restored = await restore(repository, (await writer.finish()).id)
    const expected = Buffer.alloc(100_000)
    expected.fill(3, 8192, 12_288).fill(3, 98_304)
    assert.ok(restored.equals(expected))
  })

  test('a request that cannot be right is refused before anything is stored', async () => {
    const repository = await initInline(new MemoryStore())
    const base = { machine: 'vm1', moment: 1, kind: 'full' as const, disks: [{ name: 'sda', size: 4096 }] }
    await fails('invalid-argument', () => repository.begin({ ...base, machine: '' }), /name of its machine/)
    await fails('invalid-argument', () => repository.begin({ ...base, moment: 1.5 }), /no moment/)
    await fails('invalid-argument', () => repository.begin({ ...base, disks: [] }), /at least one disk/)
    await fails('invalid-argument', () => repository.begin({ ...base, disks: [...base.disks, ...base.disks] }), /twice/)
    await fails('invalid-argument', () => full(repository, [{ name: 'sda', size: -1 }]), /not -1/)
    const { id } = await backUp(repository, Buffer.alloc(8192, 1))
    const child = (backup: string, disk: string, size: number) =>
      repository.begin({ ...base, disks: [{ name: 'sda', size, parent: { backup, disk } }] })
    await fails('not-found', () => child(id, 'sdb', 8192), /no disk sdb, only sda/)
    await fails('not-found', () => child('20260101T000000000Z-00000000', 'sda', 8192), /no backup 2026/)
    await fails('not-found', () => child('../config', 'sda', 8192), /no backup/)
    await fails('unsupported', () => child(id, 'sda', 5000), /without a parent/)
    await fails('not-found', () => repository.openBackup('x'), /`varve backups` lists/)
  })

  test('a finished or aborted backup takes no more', async () => {
    const repository = await initInline(new MemoryStore())
    const writer = await full(repository, [{ name: 'sda', size: 4096 }])
    await writer.finish()
    await fails('closed', () => writer.disk(0).zero(0, 4096), /done/)
    await fails('closed', () => writer.finish(), /done/)
    await writer.abort()
    assert.equal((await repository.backups()).length, 1)
    const other = await full(repository, [{ name: 'sda', size: 4096 }])
    await other.abort()
    await fails('cancelled', () => other.disk(0).write(0, 4096, Buffer.alloc(4096), 0), /given up/)
    await fails('cancelled', () => other.finish(), /given up/)
    assert.equal((await repository.backups()).length, 1)
  })

  test('closing a repository ends its squeezer', async () => {
    let closed = 0
    class Watched extends InlineSqueezer {
      override async close(): Promise<void> {
        closed++
      }
    }
    await (await initRepository(new MemoryStore(), { squeezer: new Watched() })).close()
    assert.equal(closed, 1)
  })
})
