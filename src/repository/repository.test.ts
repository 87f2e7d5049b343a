import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import {
  backUp,
  beginFull,
  type Change,
  changeSome,
  initInline,
  noise,
  openInline,
  restore,
} from '../../test/support/backups.ts'
import { Random, seedOfRun } from '../base/random.ts'
import { type BackupInfo, initRepository } from './repository.ts'
import { MemoryStore } from './stores/memory.ts'

const KIB = 1024
const MIB = 1024 * KIB

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
      const writer = await beginFull(repository, [{ name: 'sda', size: content.length }])
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
    const writer = await beginFull(
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
    const writer = await beginFull(repository, [{ name: 'sda', size: 40 * MIB }])
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
    const writer = await beginFull(repository, [{ name: 'sda', size }])
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
    const interrupted = await beginFull(await initInline(store), [{ name: 'sda', size: content.length }])
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
    await backUp(repository, Buffer.alloc(5 * MIB), undefined, 2000)
    let stored = 0
    for (const key of await store.list('')) stored += (await store.get(key)).length
    const { each, ...stats } = await repository.stats()
    const { neededBytes } = stats
    assert.deepEqual(stats, {
      backups: 2,
      packs: 1,
      blobs: 48 + 12 + 1,
      logicalBytes: 8 * MIB,
      plainBytes: neededBytes,
      storedBytes: stored,
      neededBytes,
      sharedBytes: 0,
      unusedBytes: 0,
    })
    assert.ok(neededBytes > 3 * MIB && neededBytes < 3 * MIB + 10 * KIB)
    assert.deepEqual(
      each.map(({ ownBytes }) => ownBytes),
      [neededBytes, 0],
    )
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
    const doomed = await beginFull(repository, [{ name: 'sda', size: content.length }])
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
