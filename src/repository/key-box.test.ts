import assert from 'node:assert/strict'
import crypto from 'node:crypto'
import { suite, test } from 'node:test'
import { backUp, failsWith, inline, noise, restore } from '../../test/support/backups.ts'
import { Random } from '../base/random.ts'
import { type Credential, initRepository, openRepository, type Repository } from './repository.ts'
import type { ObjectStore } from './store.ts'
import { MemoryStore } from './stores/memory.ts'

const MIB = 1024 * 1024
const SECRET: Credential = { kind: 'passphrase', passphrase: 'correct horse' }
const FILE: Credential = { kind: 'file', key: Buffer.alloc(32, 7) }

const init = (store: ObjectStore, credential: Credential): Promise<Repository> =>
  initRepository(store, { ...inline(), credential })
const open = (store: ObjectStore, credential: Credential): Promise<Repository> =>
  openRepository(store, { ...inline(), credential })

async function all(store: ObjectStore): Promise<Buffer> {
  const parts: Uint8Array[] = []
  for (const key of await store.list('')) parts.push(await store.get(key))
  return Buffer.concat(parts)
}

suite('encryption', () => {
  test('backups restore byte for byte, verify and check, with threads and without', async () => {
    const store = new MemoryStore()
    const repository = await init(store, FILE)
    const content = noise(new Random(1), 3 * MIB + 100)
    content.fill('text that shrinks ', MIB, 2 * MIB)
    const full = await backUp(repository, content)
    noise(new Random(2), 8192).copy(content, 40_960)
    const { id } = await backUp(repository, content, { id: full.id, changes: [{ offset: 40_960, length: 8192 }] }, 2000)
    assert.ok((await restore(repository, id)).equals(content))
    const threaded = await openRepository(store, { credential: FILE })
    assert.ok((await restore(threaded, id)).equals(content))
    const again = await backUp(threaded, content, undefined, 3000)
    assert.ok(again.storedBytes < 200_000)
    assert.ok((await threaded.verify(again.id)).isGood)
    const report = await threaded.check({ reads: () => true })
    assert.ok(report.isGood, JSON.stringify(report))
    await threaded.close()
  })

  test('the store sees neither data nor names, nor the digest of a block that somebody knows', async () => {
    const store = new MemoryStore()
    const repository = await init(store, FILE)
    const known = Buffer.from('a very well known block of text '.repeat(128))
    const { id } = await backUp(repository, known)
    await repository.tag(id, { add: ['gold'] })
    const seen = await all(store)
    const digest = crypto.hash('sha256', known, 'buffer')
    for (const secret of ['well known block', 'vm1', 'sda', 'process ']) assert.ok(!seen.includes(secret), secret)
    assert.ok(!seen.includes(digest))
    const plain = new MemoryStore()
    await backUp(await initRepository(plain, inline()), known)
    assert.ok((await all(plain)).includes(digest))
  })

  test('the same content in two repositories looks different, also with one passphrase', async () => {
    const names: string[] = []
    for (let i = 0; i < 2; i++) {
      const store = new MemoryStore()
      const { disks } = await backUp(await init(store, FILE), Buffer.alloc(65_536, 5))
      names.push(String(disks[0]?.root))
    }
    assert.notEqual(names[0], names[1])
  })

  test('without the right credential it stays shut, and says what is missing', async () => {
    const store = new MemoryStore()
    await (await init(store, SECRET)).close()
    await failsWith('permission', () => openRepository(store, inline()), /is encrypted: give its passphrase/)
    await failsWith('permission', () => open(store, { kind: 'passphrase', passphrase: 'x' }), /not one of its 1/)
    await failsWith('permission', () => open(store, FILE), /key file is not one of its 0/)
    const plain = new MemoryStore()
    await (await initRepository(plain, inline())).close()
    await failsWith('permission', () => open(plain, SECRET), /is not encrypted/)
  })

  test('a passphrase is changed without a pack being touched', async () => {
    const store = new MemoryStore()
    const repository = await init(store, SECRET)
    const content = noise(new Random(4), MIB)
    const { id } = await backUp(repository, content)
    const packs = await store.list('packs/')
    const [old] = await repository.keys()
    assert.ok(old !== undefined)
    await failsWith('invalid-argument', () => repository.removeKey(old.name), /is the only key/)
    await repository.addKey(FILE, 'the new one')
    await repository.removeKey(old.name)
    await failsWith('not-found', () => repository.removeKey(old.name), /has no key/)
    assert.deepEqual(await store.list('packs/'), packs)
    await failsWith('permission', () => open(store, SECRET), /not one of its 0/)
    const reopened = await open(store, FILE)
    assert.ok((await restore(reopened, id)).equals(content))
    assert.deepEqual(
      (await reopened.keys()).map(({ kind, label }) => [kind, label]),
      [['file', 'the new one']],
    )
  })

  test('a plain repository takes no keys', async () => {
    const repository = await initRepository(new MemoryStore(), inline())
    await failsWith('unsupported', () => repository.addKey(FILE, 'x'), /is not encrypted/)
    assert.deepEqual(await repository.keys(), [])
  })

  test('blobs that were swapped, and texts that were put under another name, are damage', async () => {
    const store = new MemoryStore()
    const repository = await init(store, FILE)
    const one = await backUp(repository, Buffer.alloc(8192, 1), undefined, 1000)
    const two = await backUp(repository, Buffer.alloc(8192, 2), undefined, 2000)
    const manifest = await store.get(`backups/${one.id}`)
    await store.remove(`backups/${two.id}`)
    await store.put(`backups/${two.id}`, [manifest])
    assert.equal((await repository.list()).damaged[0]?.id, two.id)
    await failsWith('corrupt', () => repository.openBackup(two.id), /damaged/)
  })

  test('prunings and copies keep it encrypted', async () => {
    const store = new MemoryStore()
    const repository = await init(store, FILE)
    const random = new Random(5)
    const content = noise(random, MIB)
    const doomed = await backUp(repository, Buffer.concat([content, noise(random, 2 * MIB)]), undefined, 1000)
    const kept = await backUp(repository, content, undefined, 2000)
    await repository.forget(doomed.id)
    assert.equal((await repository.prune()).repackedPacks, 1)
    assert.ok((await restore(await open(store, FILE), kept.id)).equals(content))
    const other = await init(new MemoryStore('other'), { kind: 'file', key: Buffer.alloc(32, 8) })
    const plain = await initRepository(new MemoryStore('plain'), inline())
    for (const [from, to] of [
      [repository, other],
      [other, plain],
      [plain, repository],
    ] as const) {
      for (const { to: copy } of await from.copyTo(to)) {
        if (copy === undefined) continue
        assert.ok((await restore(to, copy)).equals(content))
        assert.ok((await to.verify(copy)).isGood)
      }
    }
    // Each has it once, wherever it came from.
    for (const each of [repository, other, plain]) assert.equal((await each.backups()).length, 1)
  })
})
