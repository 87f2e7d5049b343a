// Makes the repositories of test/golden/repositories that are not there yet, and notes in repositories.json what each holds. It never
// makes one again: these are the bytes that a Varve wrote on its day, which every later one must read and go on with.
// golden-repositories.test.ts opens them.
//
//   NAME/config, NAME/packs/...    the objects as they lie in a folder
//   repositories.json              for each: who made it, what opens it, its backups, and the SHA-256 of each disk

import { createHash } from 'node:crypto'
import fs from 'node:fs'
import path from 'node:path'
import { Random } from '../../src/base/random.ts'
import { realHost } from '../../src/host/real.ts'
import {
  type Credential,
  initRepository,
  openRepository,
  type Repository,
  type RepositoryOptions,
} from '../../src/repository/repository.ts'
import { Session } from '../../src/repository/session.ts'
import type { ObjectStore } from '../../src/repository/store.ts'
import { DirectoryStore } from '../../src/repository/stores/directory.ts'
import { PLAIN_VAULT } from '../../src/repository/vault.ts'
import { changeSome, inline, noise, restore } from '../support/backups.ts'

const KIB = 1024
const SIZE = 384 * KIB
const DAY = 24 * 3_600_000
const START = Date.UTC(2026, 0, 1)
const FOLDER = path.join(import.meta.dirname, '..', 'golden', 'repositories')
const LIST = path.join(FOLDER, '..', 'repositories.json')

export interface GoldenBackup {
  readonly id: string
  readonly machine: string
  readonly kind: 'full' | 'incremental'
  readonly moment: number
  readonly tags: readonly string[]
  readonly labels: Readonly<Record<string, string>>
  readonly disks: readonly { readonly name: string; readonly size: number; readonly sha256: string }[]
}

export interface GoldenRepository {
  /** The program and its version. */
  readonly by: string
  readonly what: string
  readonly passphrase?: string
  /** 64 hexadecimal digits. */
  readonly key?: string
  /** In the order of their moments. */
  readonly backups: readonly GoldenBackup[]
}

interface Recipe extends Pick<GoldenRepository, 'what' | 'passphrase' | 'key'> {
  readonly make: (store: ObjectStore, options: RepositoryOptions) => Promise<void>
}

/** What a disk holds in the end, and what backs it up as it changes. */
class Machine {
  readonly content: Buffer
  readonly #repository: Repository
  readonly #name: string
  readonly #random: Random
  #parent: string | undefined
  #day = 0

  constructor(repository: Repository, name: string, seed: number, size = SIZE) {
    this.#repository = repository
    this.#name = name
    this.#random = new Random(seed)
    this.content = Buffer.alloc(size)
    // Text, noise and holes.
    for (let at = 0; at + 48 * KIB <= size; at += 128 * KIB) {
      this.content.fill(`${name} at ${at}. `, at, at + 32 * KIB)
      noise(this.#random, 16 * KIB).copy(this.content, at + 32 * KIB)
    }
  }

  /** Of the whole disk at first, then of what changed; a second disk is empty. Returns the backup's id. */
  async backUp(isFull = this.#parent === undefined): Promise<string> {
    const changes = isFull
      ? [{ offset: 0, length: this.content.length }]
      : changeSome(this.content, this.#random, 4, 9000)
    const parent = isFull || this.#parent === undefined ? {} : { parent: { backup: this.#parent, disk: 'sda' } }
    const writer = await this.#repository.begin({
      machine: this.#name,
      moment: START + this.#day++ * DAY,
      kind: isFull ? 'full' : 'incremental',
      disks: [
        { name: 'sda', size: this.content.length, ...parent },
        { name: 'empty', size: 10 * KIB },
      ],
    })
    for (const { offset, length } of changes) await writer.disk(0).write(offset, length, this.content, offset)
    const { id } = await writer.finish({ labels: { checkpoint: `day-${this.#day}` }, disks: [{ lineage: 'a' }, {}] })
    this.#parent = id
    return id
  }
}

/** Two machines, fulls and incrementals, one of a size that is no multiple of a chunk, and a tag. */
async function makeSome(store: ObjectStore, options: RepositoryOptions): Promise<void> {
  const repository = await initRepository(store, options)
  const one = new Machine(repository, 'vm1', 1)
  const two = new Machine(repository, 'vm2', 2, 200 * KIB + 512)
  const first = await one.backUp()
  for (let i = 0; i < 3; i++) await one.backUp()
  await two.backUp()
  await two.backUp(true)
  await repository.tag(first, { add: ['gold', 'first'] })
  await repository.close()
}

/**
 * Long use: a client that only adds, backups that were forgotten, packs that were pruned and rewritten; and what is under way: a backup that
 * nobody finished, a session, a mark that waits for it, a note whose manifest is still there.
 */
async function makeHistory(store: ObjectStore, options: RepositoryOptions): Promise<void> {
  const keeper = await initRepository(store, options)
  const client = await openRepository(store, { ...options, appendOnly: true })
  const machine = new Machine(client, 'vm1', 3)
  const ids: string[] = []
  for (let i = 0; i < 8; i++) ids.push(await machine.backUp(i === 5))
  for (const id of ids.slice(0, 3)) await keeper.forget(id)
  await keeper.prune({ repackBelow: 1 })
  for (let i = 0; i < 2; i++) ids.push(await machine.backUp())
  const crashed = await client.begin({
    machine: 'vm9',
    moment: START,
    kind: 'full',
    disks: [{ name: 'sda', size: SIZE }],
  })
  await crashed.disk(0).write(0, 64 * KIB, noise(new Random(4), 64 * KIB), 0)
  await crashed.store()
  await crashed.abort()
  const place = { store, vault: PLAIN_VAULT, holder: 'process 1 on golden' }
  const begun = { id: '20260120T000000000Z-0badcafe', kind: 'backup', parents: [ids[3] as string] } as const
  const session = await Session.begin(place, begun)
  for (const id of ids.slice(3, 5)) await keeper.forget(id)
  await keeper.prune({ repackBelow: 1 })
  session.abandon()
  await client.close()
  await keeper.close()
}

const RECIPES: Readonly<Record<string, Recipe>> = {
  plain: { what: 'two machines', make: makeSome },
  encrypted: {
    what: 'the same, encrypted, with a passphrase and a key file',
    passphrase: 'sediment of one year',
    key: '07'.repeat(32),
    make: async (store, options) => {
      await makeSome(store, options)
      const repository = await openRepository(store, options)
      await repository.addKey({ kind: 'file', key: Buffer.alloc(32, 7) }, 'second')
      await repository.close()
    },
  },
  history: { what: 'added to, forgotten, pruned, and left in the middle of it', make: makeHistory },
}

async function describeBackups(store: ObjectStore, options: RepositoryOptions): Promise<GoldenBackup[]> {
  const repository = await openRepository(store, options)
  const { backups, tags } = await repository.list()
  const found: GoldenBackup[] = []
  for (const { id, machine, kind, moment, labels, disks } of backups) {
    const described: { name: string; size: number; sha256: string }[] = []
    for (const [index, { name, size }] of disks.entries()) {
      const sha256 = createHash('sha256').update(await restore(repository, id, index))
      described.push({ name, size, sha256: sha256.digest('hex') })
    }
    found.push({ id, machine, kind, moment, tags: tags.get(id) ?? [], labels, disks: described })
  }
  await repository.close()
  return found
}

async function main(): Promise<void> {
  const known = fs.existsSync(LIST)
    ? (JSON.parse(fs.readFileSync(LIST, 'utf8')) as Record<string, GoldenRepository>)
    : {}
  const packageFile = path.join(FOLDER, '..', '..', '..', 'package.json')
  const { version } = JSON.parse(fs.readFileSync(packageFile, 'utf8')) as { version: string }
  for (const [name, { what, passphrase, key, make }] of Object.entries(RECIPES)) {
    if (name in known) continue
    const store = new DirectoryStore(realHost, path.join(FOLDER, name))
    const credential: Credential | undefined = passphrase === undefined ? undefined : { kind: 'passphrase', passphrase }
    const options = { ...inline(), tool: `varve ${version}`, ...(credential === undefined ? {} : { credential }) }
    await make(store, options)
    const backups = await describeBackups(store, options)
    known[name] = {
      by: `Varve ${version}`,
      what,
      ...(passphrase === undefined ? {} : { passphrase }),
      ...(key === undefined ? {} : { key }),
      backups,
    }
    process.stdout.write(`made ${name}\n`)
  }
  fs.writeFileSync(LIST, `${JSON.stringify(known, undefined, 2)}\n`)
}

await main()
