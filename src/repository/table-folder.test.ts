import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { backUp, changeSome, failsWith, inline, noise, restore } from '../../test/support/backups.ts'
import { Random } from '../base/random.ts'
import { SimulatedHost } from '../host/simulated.ts'
import { BlobIndex, NO_ENTRY } from './blob-index.ts'
import { newPackName, type PackDirectory, writeRecord } from './pack.ts'
import { initRepository, openRepository, type RepositoryOptions } from './repository.ts'
import { BLOB_CHUNK, CODEC_RAW, ID_BYTES, RECORD_BYTES } from './spec.ts'
import { MemoryStore } from './stores/memory.ts'
import { TableFolder } from './table-folder.ts'

const FOLDER = '/tables'
const ALL = { hasPack: () => true, hasIndex: () => true }

/** A pack of blobs; `ids` are used first. Some ids begin alike, as those of very many blobs do. */
function packOf(random: Random, count: number, ids: readonly Uint8Array[] = []): PackDirectory {
  const records = new Uint8Array(count * RECORD_BYTES)
  for (let i = 0; i < count; i++) {
    const id = ids[i] ?? random.fill(new Uint8Array(ID_BYTES))
    if (ids[i] === undefined && random.chance(0.1)) id.fill(7, 0, 4)
    const stored = random.between(1, 4096)
    writeRecord(records, i * RECORD_BYTES, id, {
      stored,
      plain: stored,
      crc: random.next(),
      type: BLOB_CHUNK,
      codec: CODEC_RAW,
    })
  }
  return { pack: newPackName(), count, records }
}

/** What an index says of every blob of the packs must be what the packs' directories say. */
function assertFinds(index: BlobIndex, packs: readonly PackDirectory[]): void {
  for (const { pack, count, records } of packs) {
    let offset = 16
    for (let i = 0; i < count; i++) {
      const at = i * RECORD_BYTES
      const view = Buffer.from(records.buffer, at, RECORD_BYTES)
      const entry = index.find(records, at)
      assert.ok(entry !== NO_ENTRY)
      assert.deepEqual(index.id(entry), records.slice(at, at + ID_BYTES))
      assert.deepEqual(
        [index.pack(entry), index.offset(entry), index.stored(entry), index.plain(entry), index.crc(entry)],
        [pack, offset, view.readUInt32BE(32), view.readUInt32BE(36), view.readUInt32BE(40)],
      )
      offset += view.readUInt32BE(32)
    }
  }
}

async function tableOf(folder: TableFolder, packs: readonly PackDirectory[]) {
  const index = new BlobIndex()
  for (const pack of packs) index.addPack(pack)
  return folder.write(index, { [`index/${packs[0]?.pack}`]: packs.map(({ pack }) => pack) })
}

suite('tables of blobs', () => {
  test('every blob is found in tables, joined or not, and no other', async () => {
    const random = new Random(1)
    const host = new SimulatedHost()
    const folder = new TableFolder(host, FOLDER)
    const packs = Array.from({ length: 12 }, () => packOf(random, random.between(1, 900)))
    const tables = []
    for (let i = 0; i < packs.length; i += 2) tables.push(await tableOf(folder, packs.slice(i, i + 2)))
    const apart = new BlobIndex(tables)
    assertFinds(apart, packs)
    const joined = await folder.join(tables, ALL)
    assert.ok(joined.length < tables.length)
    const index = new BlobIndex(joined)
    const recent = packOf(random, 100)
    index.addPack(recent)
    assertFinds(index, [...packs, recent])
    for (let i = 0; i < 1000; i++) assert.equal(index.find(random.fill(new Uint8Array(ID_BYTES)), 0), NO_ENTRY)
    let seen = 0
    await index.visit((entry, pack, stored, plain) => {
      seen++
      assert.deepEqual([index.packNumber(entry), index.stored(entry), index.plain(entry)], [pack, stored, plain])
    })
    assert.equal(seen, index.count)
    const again = await new TableFolder(host, FOLDER).load()
    assertFinds(new BlobIndex(again), packs)
    assert.equal(again.flatMap(({ notes }) => Object.keys(notes.indexes)).length, 6)
  })

  test('of several copies the one that lasts is found, then one that is condemned, and none that is gone', async () => {
    const random = new Random(2)
    const folder = new TableFolder(new SimulatedHost(), FOLDER)
    const ids = Array.from({ length: 300 }, () => random.fill(new Uint8Array(ID_BYTES)))
    const packs = [1, 2, 3].map(() => packOf(random, 300, ids))
    const tables = [await tableOf(folder, packs.slice(0, 2)), await tableOf(folder, packs.slice(2))]
    const found = (gone: readonly number[], condemned: readonly number[]): number => {
      const is = (numbers: readonly number[]) => (pack: string) => numbers.some((i) => packs[i]?.pack === pack)
      const index = new BlobIndex(tables, { isThere: (pack) => !is(gone)(pack), isCondemned: is(condemned) })
      const names = new Set(ids.map((id) => (index.find(id, 0) === NO_ENTRY ? '' : index.pack(index.find(id, 0)))))
      assert.equal(names.size, 1)
      return packs.findIndex(({ pack }) => pack === [...names][0])
    }
    assert.equal(found([0, 1], []), 2)
    assert.equal(found([0], [1]), 2)
    assert.equal(found([0, 2], [1]), 1)
    assert.equal(found([1], [0, 2]), 0)
    assert.equal(found([0, 1, 2], []), -1)
    const joined = await folder.join(tables, ALL)
    assert.equal(joined.length, 2, 'few are left as they are')
  })

  test('tables that share a pack, are damaged or were left half written are taken away at the next opening', async () => {
    const random = new Random(3)
    const host = new SimulatedHost()
    const folder = new TableFolder(host, FOLDER)
    const packs = [packOf(random, 500), packOf(random, 50), packOf(random, 50)] as const
    await tableOf(folder, packs.slice(0, 2))
    await tableOf(folder, packs.slice(1, 3))
    const spoiled = await tableOf(folder, packs.slice(2))
    await folder.close()
    const file = await host.open(spoiled.path, { write: true })
    await file.write(file.size() - 80, 1, Uint8Array.of(1), 0)
    await file.close()
    await (await host.open(`${FOLDER}/left.table.part`, { write: true, create: 'exclusive' })).close()
    const tables = await new TableFolder(host, FOLDER).load()
    assert.deepEqual(
      tables.map(({ count }) => count),
      [550],
    )
    assert.equal((await host.list(FOLDER)).length, 1)
  })

  test('a page that is not as it was written is an error that says so, and the table is made anew', async () => {
    const host = new SimulatedHost()
    const store = new MemoryStore()
    const content = noise(new Random(4), 400_000)
    const options = withTables(host)
    const repository = await initRepository(store, options)
    const { id } = await backUp(repository, content)
    await (await openRepository(store, options)).close()
    const [name = ''] = await host.list(`${FOLDER}/${repository.id}`)
    const table = await host.open(`${FOLDER}/${repository.id}/${name}`, { write: true })
    await table.write(60, 1, Uint8Array.of(0xff), 0)
    await table.close()
    const damaged = await openRepository(store, options)
    await failsWith('io', () => restore(damaged, id), /this host's copy of the repository's index, is damaged/)
    assert.ok((await restore(damaged, id)).equals(content))
    assert.ok((await damaged.check({ reads: () => true })).isGood)
  })
})

function withTables(host: SimulatedHost): RepositoryOptions {
  return { ...inline(), tables: (id) => ({ folder: new TableFolder(host, `${FOLDER}/${id}`), memoryBlobs: 4 }) }
}

suite('a repository with its index on disk', () => {
  test('backups, forgetting, pruning and checks give what they give with an index in memory', async () => {
    const random = new Random(5)
    const host = new SimulatedHost()
    const store = new MemoryStore()
    const options = withTables(host)
    await (await initRepository(store, options)).close()
    const contents = new Map<string, Buffer>()
    const content = noise(random, 600_000)
    let parent: string | undefined
    for (let day = 0; day < 12; day++) {
      const repository = await openRepository(store, options)
      const changes = changeSome(content, random, 3, 30_000)
      const { id } = await backUp(
        repository,
        content,
        parent === undefined ? undefined : { id: parent, changes },
        1000 + day,
      )
      contents.set(id, Buffer.from(content))
      parent = id
      if (day % 4 === 3) {
        const [oldest = ''] = contents.keys()
        contents.delete(oldest)
        await repository.forget(oldest)
        await repository.prune({ repackBelow: 1 })
      }
      await repository.close()
    }
    assert.ok((await host.list(FOLDER)).length > 0, 'there are tables')
    for (const each of [options, inline()]) {
      const repository = await openRepository(store, each)
      for (const [id, expected] of contents) assert.ok((await restore(repository, id)).equals(expected), id)
      assert.ok((await repository.check({ reads: () => true })).isGood)
      const { unusedBytes, each: backups } = await repository.stats()
      assert.equal(unusedBytes, 0)
      assert.equal(backups.length, contents.size)
      await repository.close()
    }
  })

  test('a backup that makes more blobs than fit into memory puts them into tables while it runs', async () => {
    const host = new SimulatedHost()
    const store = new MemoryStore()
    const repository = await initRepository(store, withTables(host))
    const content = noise(new Random(6), 40_000_000)
    const { id } = await backUp(repository, content)
    assert.ok((await host.list(`${FOLDER}/${repository.id}`)).length > 0)
    assert.equal((await backUp(repository, content, undefined, 2000)).storedBytes, 0)
    assert.ok((await restore(repository, id)).equals(content))
  })
})
