// Large repositories, by hand: what time, space and memory they take. Prints a line for each step.
//
//   node test/e2e/run-repository-scale.ts days [--gib 64] [--filled 0] [--days 1000] [--share 0.001] [--discard] [--folder FOLDER]
//       a full backup of a disk of which the part `filled` is data, then a backup a day after the part `share` of it changed, in random blocks of
//       4 KiB; then the first and the last are restored, and a policy prunes most of them. With --discard the store keeps the sizes of chunks and not what
//       is in them, and nothing is restored
//   node test/e2e/run-repository-scale.ts blobs [--millions 10] [--folder FOLDER]
//       the index of so many chunks: opened first and again, looked up, and the memory of it
//
// The store syncs nothing: what is measured is Varve's own work.

import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { parseArgs } from 'node:util'
import { equalBytes, getUint32, setUint32 } from '../../src/base/bytes.ts'
import { Random } from '../../src/base/random.ts'
import { BlockError } from '../../src/block/error.ts'
import { realHost } from '../../src/host/real.ts'
import { encodeIndex } from '../../src/repository/index-object.ts'
import { Inventory } from '../../src/repository/inventory.ts'
import { newPackName, type PackDirectory, writeRecord } from '../../src/repository/pack.ts'
import { initRepository, openRepository, type Repository } from '../../src/repository/repository.ts'
import { BLOB_CHUNK, BLOB_NODE, CODEC_RAW, ID_BYTES, RECORD_BYTES } from '../../src/repository/spec.ts'
import { type ObjectStatus, type ObjectStore, totalLength } from '../../src/repository/store.ts'
import { TableFolder } from '../../src/repository/table-folder.ts'
import { PLAIN_VAULT } from '../../src/repository/vault.ts'

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    gib: { type: 'string', default: '64' },
    filled: { type: 'string', default: '0' },
    days: { type: 'string', default: '1000' },
    share: { type: 'string', default: '0.001' },
    discard: { type: 'boolean', default: false },
    millions: { type: 'string', default: '10' },
    folder: { type: 'string', default: os.tmpdir() },
  },
})

const GRANULE = 4096
const MIB = 1024 * 1024
/** Larger disks are not read through. */
const RESTORED_MAX = 1024 * 1024 * MIB
const DAY = 24 * 3_600_000
const START = Date.UTC(2024, 0, 1)

/** A folder without syncs. Of packs it may leave out the chunks, which are holes then. */
class ScaleStore implements ObjectStore {
  readonly name: string
  readonly #discards: boolean
  readonly #sizes = new Map<string, number>()

  constructor(folder: string, discards: boolean) {
    this.name = folder
    this.#discards = discards
  }

  get bytes(): number {
    let sum = 0
    for (const size of this.#sizes.values()) sum += size
    return sum
  }

  /** There is nothing behind the key but its being there. */
  pretend(key: string): void {
    this.#sizes.set(key, 0)
  }

  async put(key: string, parts: readonly Uint8Array[]): Promise<void> {
    if (this.#sizes.has(key)) throw new BlockError('exists', `${key} exists`)
    fs.mkdirSync(path.dirname(this.#path(key)), { recursive: true })
    const fd = fs.openSync(this.#path(key), 'w')
    let at = 0
    const kept = this.#discards && key.startsWith('packs/') ? chunksEnd(parts) : 0
    for (const part of parts) {
      const skipped = at < 16 ? 0 : Math.min(part.length, Math.max(0, kept - at))
      if (skipped < part.length) fs.writeSync(fd, part, skipped, part.length - skipped, at + skipped)
      at += part.length
    }
    fs.closeSync(fd)
    this.#sizes.set(key, totalLength(parts))
  }

  async get(key: string): Promise<Uint8Array> {
    this.#mustHave(key)
    return fs.readFileSync(this.#path(key))
  }

  async getRange(key: string, offset: number, length: number): Promise<Uint8Array> {
    this.#mustHave(key)
    const bytes = Buffer.alloc(length)
    const fd = fs.openSync(this.#path(key), 'r')
    fs.readSync(fd, bytes, 0, length, offset)
    fs.closeSync(fd)
    return bytes
  }

  async status(key: string): Promise<ObjectStatus | undefined> {
    const size = this.#sizes.get(key)
    return size === undefined ? undefined : { size, createdMs: Date.now() }
  }

  async list(prefix: string): Promise<string[]> {
    return [...this.#sizes.keys()].filter((key) => key.startsWith(prefix)).sort()
  }

  async remove(key: string): Promise<void> {
    if (this.#sizes.delete(key)) fs.rmSync(this.#path(key))
  }

  #mustHave(key: string): void {
    if (!this.#sizes.has(key)) throw new BlockError('not-found', `there is no ${key}`)
  }

  #path(key: string): string {
    return path.join(this.name, key)
  }
}

/** Where the chunks of a pack end: its nodes follow them. */
function chunksEnd(parts: readonly Uint8Array[]): number {
  const records = parts.at(-2) as Uint8Array
  let end = 16
  for (let at = 0; at < records.length && records[at + 44] !== BLOB_NODE; at += RECORD_BYTES) {
    end += getUint32(records, at + 32)
  }
  return end
}

const PAGE = 256

/** How often each granule was written; of a part of the disk that never was, nothing is kept. */
class Versions {
  readonly #pages = new Map<number, Uint16Array>()

  get(granule: number): number {
    return this.#pages.get(Math.floor(granule / PAGE))?.[granule % PAGE] ?? 0
  }

  /** Returns the new number. */
  count(granule: number): number {
    const number = Math.floor(granule / PAGE)
    const page = this.#pages.get(number) ?? new Uint16Array(PAGE)
    this.#pages.set(number, page)
    const version = (page[granule % PAGE] as number) + 1
    page[granule % PAGE] = version
    return version
  }

  copy(): Versions {
    const copy = new Versions()
    for (const [number, page] of this.#pages) copy.#pages.set(number, page.slice())
    return copy
  }
}

/** What a granule holds after it was written so often. */
class Contents {
  readonly versions = new Versions()
  readonly #pool = Buffer.alloc(16 * MIB)

  constructor() {
    const random = new Random(1)
    for (let at = 0; at < this.#pool.length; at += 4) this.#pool.writeUInt32LE(random.next(), at)
  }

  copy(granule: number, version: number, into: Uint8Array, at: number): void {
    const from = ((granule * 31 + version * 1_000_003) % (this.#pool.length / 64 - 64)) * 64
    into.set(this.#pool.subarray(from, from + GRANULE), at)
    setUint32(into, at, granule)
    setUint32(into, at + 4, version)
  }
}

let lastMs = performance.now()
let lastCpu = process.cpuUsage()
let peakRss = 0

/** A line about what was done since the last one. */
function tell(what: string, figures: Readonly<Record<string, number | string>> = {}): void {
  const ms = performance.now() - lastMs
  const rss = process.memoryUsage().rss
  peakRss = Math.max(peakRss, rss)
  const { user, system } = process.cpuUsage(lastCpu)
  const cpuSeconds = ((user + system) / 1e6).toFixed(2)
  const all = { seconds: (ms / 1000).toFixed(2), cpuSeconds, ...figures, rssMiB: Math.round(rss / MIB) }
  const list = Object.entries(all).map(([name, value]) => `${name} ${value}`)
  console.log(`${what}: ${list.join(', ')}`)
  lastMs = performance.now()
  lastCpu = process.cpuUsage()
}

const mib = (bytes: number): string => (bytes / MIB).toFixed(1)

async function backUpDay(
  repository: Repository,
  size: number,
  moment: number,
  parent: string | undefined,
  write: (writer: Awaited<ReturnType<Repository['begin']>>) => Promise<void>,
): Promise<string> {
  const writer = await repository.begin({
    machine: 'vm1',
    moment,
    kind: parent === undefined ? 'full' : 'incremental',
    disks: [{ name: 'sda', size, ...(parent && { parent: { backup: parent, disk: 'sda' } }) }],
  })
  await write(writer)
  return (await writer.finish()).id
}

/** Reads all that a backup holds, and compares it where `versions` says what that is. */
async function readWhole(repository: Repository, id: string, contents: Contents, versions: Versions): Promise<void> {
  const reader = await repository.openBackup(id)
  const device = reader.disks[0]?.device
  if (device === undefined) throw new Error('a backup of one disk')
  const piece = Buffer.alloc(MIB)
  const expected = Buffer.alloc(GRANULE)
  let bytes = 0
  for (let offset = 0; offset < device.size; offset += piece.length) {
    await device.read(offset, piece.length, piece, 0)
    bytes += piece.length
    const granule = offset / GRANULE
    for (let i = 0; i < piece.length / GRANULE; i += 16) {
      const version = versions.get(granule + i)
      if (version === 0) expected.fill(0)
      else contents.copy(granule + i, version, expected, 0)
      if (!equalBytes(expected, piece.subarray(i * GRANULE, (i + 1) * GRANULE))) throw new Error(`wrong at ${offset}`)
    }
  }
  await reader.close()
  tell(`restored ${id}`, { MiB: mib(bytes) })
}

async function runDays(folder: string): Promise<void> {
  const size = Number(values.gib) * 1024 * MIB
  const granules = size / GRANULE
  const contents = new Contents()
  const store = new ScaleStore(path.join(folder, 'repository'), values.discard)
  const options = {
    tables: (id: string) => ({ folder: new TableFolder(realHost, path.join(folder, 'tables', id)) }),
  }
  let repository = await initRepository(store, options)
  const piece = Buffer.alloc(MIB)
  const filled = Math.floor((granules * Number(values.filled)) / 256) * 256
  const first = await backUpDay(repository, size, START, undefined, async (writer) => {
    for (let granule = 0; granule < filled; granule += 256) {
      for (let i = 0; i < 256; i++) contents.copy(granule + i, contents.versions.count(granule + i), piece, i * GRANULE)
      await writer.disk(0).write(granule * GRANULE, MIB, piece, 0)
    }
  })
  const atFirst = contents.versions.copy()
  tell('full', { changedMiB: mib(filled * GRANULE), repositoryMiB: mib(store.bytes) })
  const random = new Random(2)
  const perDay = Math.max(1, Math.round(granules * Number(values.share)))
  let parent = first
  let before = store.bytes
  for (let day = 1; day < Number(values.days); day++) {
    const places = new Set<number>()
    while (places.size < perDay) places.add(random.below(granules))
    parent = await backUpDay(repository, size, START + day * DAY, parent, async (writer) => {
      for (const granule of [...places].sort((a, b) => a - b)) {
        contents.copy(granule, contents.versions.count(granule), piece, 0)
        await writer.disk(0).write(granule * GRANULE, GRANULE, piece, 0)
      }
    })
    if (day % 100 !== 0) continue
    const stored = (store.bytes - before) / (100 * perDay * GRANULE)
    before = store.bytes
    tell(`days to ${day}`, { storedPerChanged: stored.toFixed(2), repositoryMiB: mib(store.bytes) })
  }
  await repository.close()
  tell('closed', { repositoryMiB: mib(store.bytes) })
  repository = await openRepository(store, options)
  tell('opened')
  tell('listed', { backups: (await repository.list()).backups.length })
  if (!values.discard && size <= RESTORED_MAX) {
    await readWhole(repository, first, contents, atFirst)
    await readWhole(repository, parent, contents, contents.versions)
  }
  const { blobs, packs, neededBytes } = await repository.stats()
  tell('stats', { blobs, packs, neededMiB: mib(neededBytes) })
  const keep = { daily: 30, weekly: 8, monthly: 12 }
  // Chunks that are not there cannot be written anew.
  const repackBelow = values.discard ? 0 : 0.7
  const plan = await repository.prune({ keep, dryRun: true, repackBelow })
  tell('prune, dry', { forgotten: plan.forgotten.length, wouldRemoveMiB: mib(plan.removedBytes) })
  const done = await repository.prune({ keep, repackBelow })
  tell('pruned', { removedPacks: done.removedPacks, removedMiB: mib(done.removedBytes), leftMiB: mib(store.bytes) })
  const { isGood } = await repository.check()
  tell('checked', { isGood: String(isGood) })
  await repository.close()
}

async function runBlobs(folder: string): Promise<void> {
  const store = new ScaleStore(path.join(folder, 'repository'), false)
  const perPack = 250
  const perIndex = 320
  const total = Number(values.millions) * 1_000_000
  const random = new Random(3)
  const known: Uint8Array[] = []
  for (let made = 0; made < total; ) {
    const directories: PackDirectory[] = []
    for (; directories.length < perIndex && made < total; made += perPack) {
      const records = new Uint8Array(perPack * RECORD_BYTES)
      const id = new Uint8Array(ID_BYTES)
      for (let i = 0; i < perPack; i++) {
        for (let at = 0; at < ID_BYTES; at += 4) setUint32(id, at, random.next())
        const crc = random.next()
        writeRecord(records, i * RECORD_BYTES, id, {
          stored: 65_536,
          plain: 65_536,
          crc,
          type: BLOB_CHUNK,
          codec: CODEC_RAW,
        })
        if (i === 0) known.push(id.slice())
      }
      const pack = newPackName()
      store.pretend(`packs/${pack}`)
      directories.push({ pack, count: perPack, records })
    }
    await store.put(`index/${newPackName()}`, [encodeIndex(PLAIN_VAULT, directories)])
  }
  tell(`an index of ${total} blobs`, { MiB: mib(store.bytes) })
  const open = async (what: string): Promise<Inventory> => {
    const place = { folder: new TableFolder(realHost, path.join(folder, 'tables')) }
    const inventory = new Inventory(store, PLAIN_VAULT, place)
    const { blobs } = await inventory.refresh()
    globalThis.gc?.()
    tell(what, { blobs: blobs.count, indexMiB: mib(blobs.bytes) })
    return inventory
  }
  await (await open('opened, tables are made')).close()
  const inventory = await open('opened again')
  const { blobs } = inventory
  for (const id of known) if (blobs.find(id, 0) < 0) throw new Error('a blob is not found')
  tell(`looked up ${known.length} that are there`)
  for (const id of known) if (blobs.find(Buffer.from(id).reverse(), 0) >= 0) throw new Error('a blob is found')
  tell(`looked up ${known.length} that are not`)
  await inventory.close()
}

const folder = fs.mkdtempSync(path.join(values.folder, 'varve-scale-'))
try {
  if (positionals[0] === 'days') await runDays(folder)
  else if (positionals[0] === 'blobs') await runBlobs(folder)
  else throw new Error('say days or blobs')
  console.log(`most memory at a line: ${Math.round(peakRss / MIB)} MiB`)
} finally {
  fs.rmSync(folder, { recursive: true })
}
