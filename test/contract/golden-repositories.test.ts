// Old repositories go on being read as they were, and used: those in test/golden/repositories, written by earlier builds of Varve
// (make-golden-repositories.ts says how). Each test works on a copy in memory.

import assert from 'node:assert/strict'
import { createHash } from 'node:crypto'
import fs from 'node:fs'
import path from 'node:path'
import { test } from 'node:test'
import { Random } from '../../src/base/random.ts'
import { openRepository, type Repository, type RepositoryOptions } from '../../src/repository/repository.ts'
import { MemoryStore } from '../../src/repository/stores/memory.ts'
import { backUp, changeSome, failsWith, inline, restore } from '../support/backups.ts'
import type { GoldenBackup, GoldenRepository } from './make-golden-repositories.ts'

const FOLDER = path.join(import.meta.dirname, '..', 'golden')
const REPOSITORIES = JSON.parse(fs.readFileSync(path.join(FOLDER, 'repositories.json'), 'utf8')) as Record<
  string,
  GoldenRepository
>

async function copyOf(name: string): Promise<MemoryStore> {
  const store = new MemoryStore(name)
  const folder = path.join(FOLDER, 'repositories', name)
  for (const entry of fs.readdirSync(folder, { recursive: true, withFileTypes: true })) {
    if (!entry.isFile()) continue
    const file = path.join(entry.parentPath, entry.name)
    await store.put(path.relative(folder, file), [fs.readFileSync(file)])
  }
  return store
}

/** All ways to open it. */
function openings({ passphrase, key }: GoldenRepository): RepositoryOptions[] {
  const options: RepositoryOptions[] = []
  if (passphrase !== undefined) options.push({ ...inline(), credential: { kind: 'passphrase', passphrase } })
  if (key !== undefined) options.push({ ...inline(), credential: { kind: 'file', key: Buffer.from(key, 'hex') } })
  return options.length === 0 ? [inline()] : options
}

/** What the list says of them, as it was noted when they were made. */
async function described(repository: Repository): Promise<GoldenBackup[]> {
  const { backups, damaged, tags } = await repository.list()
  assert.deepEqual(damaged, [])
  const all: GoldenBackup[] = []
  for (const { id, machine, kind, moment, labels, disks } of backups) {
    const hashes: GoldenBackup['disks'][number][] = []
    for (const [index, { name, size }] of disks.entries()) {
      const hash = createHash('sha256').update(await restore(repository, id, index))
      hashes.push({ name, size, sha256: hash.digest('hex') })
    }
    all.push({ id, machine, kind, moment, tags: tags.get(id) ?? [], labels, disks: hashes })
  }
  return all
}

for (const [name, golden] of Object.entries(REPOSITORIES)) {
  test(`repository ${name} reads as when it was made, every byte of it`, async () => {
    const store = await copyOf(name)
    for (const options of openings(golden)) {
      const repository = await openRepository(store, options)
      assert.deepEqual(await described(repository), golden.backups)
      const report = await repository.check({ reads: () => true })
      assert.ok(report.isGood, JSON.stringify(report))
      assert.ok(report.packsRead > 0)
    }
  })

  test(`repository ${name} takes backups, forgets and is pruned, and what stays is as it was`, async () => {
    const store = await copyOf(name)
    const [options = inline()] = openings(golden)
    const repository = await openRepository(store, options)
    const full = golden.backups.find(({ kind }) => kind === 'full') as GoldenBackup
    const last = golden.backups.at(-1) as GoldenBackup
    const same = await backUp(repository, await restore(repository, full.id), undefined, last.moment + 1)
    assert.equal(same.storedBytes, 0, 'what is there is not stored again: chunks and maps are still made as they were')
    assert.equal(same.disks[0]?.root, (await repository.backup(full.id)).disks[0]?.root)
    const content = await restore(repository, last.id)
    const changes = changeSome(content, new Random(5), 3, 9000)
    const next = await backUp(repository, content, { id: last.id, changes }, last.moment + 2)
    assert.ok((await restore(repository, next.id)).equals(content))
    const [first] = golden.backups
    await repository.forget((first as GoldenBackup).id)
    await repository.prune({ leaseMs: 0, repackBelow: 1 })
    assert.equal((await repository.stats()).unusedBytes, 0)
    assert.ok((await repository.check({ reads: () => true })).isGood)
    const known = new Set(golden.backups.map(({ id }) => id))
    const stay = (await described(await openRepository(store, options))).filter(({ id }) => known.has(id))
    assert.deepEqual(stay, golden.backups.slice(1))
  })

  test(`repository ${name} opens for its own keys only`, async () => {
    const store = await copyOf(name)
    const credential = { kind: 'file', key: Buffer.alloc(32, 99) } as const
    const says = golden.key === undefined ? /is not encrypted/ : /./
    await failsWith('permission', () => openRepository(store, { ...inline(), credential }), says)
  })
}
