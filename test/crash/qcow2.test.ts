// What a qcow2 image keeps: every acknowledged write after the process was killed, every flushed one after a power loss that
// keeps any part of what was not flushed, and at all times an image without corruption. Each run is random operations on a
// simulated host that dies at some operation; the seed of a failure is in its message. An image of version 2 has nothing
// that tells of a crash: it leaks clusters, and must have no corruption before anything was repaired.

import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { Random, seedOfRun } from '../../src/base/random.ts'
import { roundDown } from '../../src/base/round.ts'
import { MAY_UNMAP, type Layer } from '../../src/block/device.ts'
import { isBlockError } from '../../src/block/error.ts'
import { MemoryDevice } from '../../src/block/memory.ts'
import { type CreateOptions, createQcow2 } from '../../src/format/qcow2/create.ts'
import { openQcow2, type Qcow2Image } from '../../src/format/qcow2/image.ts'
import { SimulatedHost } from '../../src/host/simulated.ts'

const SECTOR = 512
const PATH = '/disk'

interface Setting {
  readonly clusterSize: number
  readonly size: number
  readonly hasBacking: boolean
  readonly isLate: boolean
  /** What else the image is made with. */
  readonly more?: Partial<CreateOptions>
}

/** Sector by sector, what the disk may hold: any of the contents since the last flush. */
class Expected {
  readonly #versions: Uint8Array[][]

  constructor(bytes: Uint8Array) {
    this.#versions = Array.from({ length: bytes.length / SECTOR }, (_, i) => [sectorOf(bytes, i)])
  }

  add(offset: number, bytes: Uint8Array): void {
    for (let i = 0; i < bytes.length / SECTOR; i++) this.#versions[offset / SECTOR + i]?.push(sectorOf(bytes, i))
  }

  /** Zeros or what was there: a trim. */
  addZeros(offset: number, length: number): void {
    this.add(offset, new Uint8Array(length))
  }

  /** How many versions each sector has: what a flush that begins now covers. */
  mark(): number[] {
    return this.#versions.map((versions) => versions.length)
  }

  /** A flush that began at `mark` is done. */
  flushed(mark: readonly number[]): void {
    this.#versions.forEach((versions, i) => versions.splice(0, (mark[i] as number) - 1))
  }

  /** The first sector of `bytes` that holds none of its versions, or -1; `onlyLast`: not its last version. */
  firstWrong(bytes: Uint8Array, onlyLast: boolean): number {
    return this.#versions.findIndex((versions, i) => {
      const found = sectorOf(bytes, i)
      const candidates = onlyLast ? versions.slice(-1) : versions
      return !candidates.some((version) => Buffer.compare(version, found) === 0)
    })
  }

  /** After a crash, what is there now is all there is. */
  settle(bytes: Uint8Array): void {
    this.#versions.forEach((versions, i) => versions.splice(0, versions.length, sectorOf(bytes, i)))
  }
}

function sectorOf(bytes: Uint8Array, index: number): Uint8Array {
  return bytes.slice(index * SECTOR, (index + 1) * SECTOR)
}

async function readAll(image: Layer): Promise<Uint8Array> {
  const bytes = new Uint8Array(image.size)
  await image.read(0, bytes.length, bytes, 0)
  return bytes
}

/** Random operations until the host dies or `count` are done; true when it died. */
async function operate(image: Layer, expected: Expected, random: Random, count: number): Promise<boolean> {
  try {
    for (let step = 0; step < count; step++) {
      const unit = random.chance(0.5) ? 4096 : SECTOR
      const offset = roundDown(random.below(image.size), unit)
      const most = random.chance(0.2) ? 65_536 : 8192
      const length = Math.min(image.size - offset, Math.max(unit, roundDown(random.below(most), unit)))
      const kind = random.below(10)
      if (kind < 6) {
        const bytes = random.fill(new Uint8Array(length))
        expected.add(offset, bytes)
        await image.write(offset, length, bytes, 0, 0)
      } else if (kind < 7) {
        expected.add(offset, new Uint8Array(length))
        await image.zero(offset, length, random.chance(0.5) ? MAY_UNMAP : 0)
      } else if (kind < 8) {
        const now = new Uint8Array(length)
        await image.read(offset, length, now, 0)
        expected.addZeros(offset, length)
        await image.trim(offset, length, 0)
        await image.read(offset, length, now, 0)
        expected.add(offset, now)
      } else {
        const mark = expected.mark()
        await image.flush()
        expected.flushed(mark)
      }
    }
    return false
  } catch (error) {
    if (isBlockError(error, 'closed')) return true
    throw error
  }
}

/** One image through several deaths of its process or host. */
async function lifeOf(setting: Setting, seed: number): Promise<void> {
  const random = new Random(seed)
  const host = new SimulatedHost(setting.isLate ? { scheduler: new Random(seed + 1) } : {})
  const { size, clusterSize } = setting
  const backing = setting.hasBacking ? new MemoryDevice(setting.size - 3 * SECTOR) : undefined
  // Its second half holds nothing: what reads as zeros is replaced without a sync.
  if (backing !== undefined) await backing.write(0, size / 2, random.fill(new Uint8Array(size)), 0, 0)
  const below = backing === undefined ? {} : { backing: { name: 'base', format: 'raw' } }
  await createQcow2(host, PATH, { size, clusterSize, ...setting.more, ...below })

  const open = async (): Promise<Qcow2Image> => {
    const image = await openQcow2(host, PATH, { name: 'disk' })
    image.backing = backing
    await image.setAccess('write')
    return image
  }
  let image = await open()
  const expected = new Expected(await readAll(image))
  let leaked = 0
  for (let life = 0; life < 5; life++) {
    const isPowerLoss = random.chance(0.6)
    const lastOperation = host.operations + random.between(1, 250)
    const keep = random.chance(0.2) ? 'none' : random.chance(0.2) ? 'all' : random
    host.beforeOperation = ({ number }) => {
      if (number !== lastOperation) return
      if (isPowerLoss) host.crash(keep)
      else host.killProcess()
    }
    const isInterrupted = await operate(image, expected, random, 120)
    host.beforeOperation = undefined
    if (!isInterrupted) {
      if (isPowerLoss) host.crash(keep)
      else host.killProcess()
    }
    const note = `seed ${seed}, life ${life}, ${isPowerLoss ? 'power loss' : 'kill'}, ${JSON.stringify(setting)}`
    try {
      image = await open()
      const now = await readAll(image)
      // A killed process may leave its last, unacknowledged operation done in part; what came before must be whole.
      const wrong = expected.firstWrong(now, !isPowerLoss && !isInterrupted)
      assert.equal(wrong, -1, `sector ${wrong} holds what was never there`)
      expected.settle(now)
      const { corruptions, leaks, problems } = await image.check()
      leaked = setting.more?.version === 2 ? leaks : 0
      assert.deepEqual({ corruptions, leaks }, { corruptions: 0, leaks: leaked }, problems.join('\n'))
    } catch (error) {
      throw new Error(`${note}: ${error instanceof Error ? error.message : String(error)}`, { cause: error })
    }
  }
  await image.close()
  const after = await openQcow2(host, PATH, { name: 'disk' })
  const { corruptions, leaks } = await after.check()
  assert.deepEqual({ corruptions, leaks }, { corruptions: 0, leaks: leaked })
  await after.close()
}

const LIVES = 12

const FEATURES: readonly (readonly [name: string, clusterSize: number, more: Partial<CreateOptions>])[] = [
  ['version 2', 512, { version: 2 }],
  ['version 2 with larger clusters', 4096, { version: 2 }],
  ['extended L2 entries', 16_384, { extendedL2: true }],
  ['a data file', 4096, { dataFile: 'data' }],
  ['a data file and extended L2 entries', 16_384, { dataFile: 'data', extendedL2: true }],
  ['a raw data file', 4096, { dataFile: 'data', dataFileRaw: true }],
]

suite('a qcow2 image outlives its process and its host', () => {
  const seed = seedOfRun()
  for (const hasBacking of [false, true]) {
    for (const isLate of [false, true]) {
      const how = `${hasBacking ? 'over a backing file' : 'alone'}${isLate ? ', operations completing late' : ''}`
      for (const clusterSize of [512, 4096, 65_536]) {
        test(`clusters of ${clusterSize}, ${how}`, async (t) => {
          t.diagnostic(`VARVE_SEED=${seed}`)
          const size = Math.max(200 * SECTOR, clusterSize * 8 + SECTOR * 3)
          for (let i = 0; i < LIVES; i++) await lifeOf({ clusterSize, size, hasBacking, isLate }, seed + i * 7919)
        })
      }
      for (const [name, clusterSize, more] of FEATURES) {
        if (hasBacking && more.dataFileRaw === true) continue
        test(`${name}, ${how}`, async (t) => {
          t.diagnostic(`VARVE_SEED=${seed}`)
          const setting = {
            clusterSize,
            size: Math.max(200, (clusterSize / SECTOR) * 9 + 3) * SECTOR,
            hasBacking,
            isLate,
            more,
          }
          for (let i = 0; i < 2 * LIVES; i++) await lifeOf(setting, seed + i * 7919)
        })
      }
    }
  }
})
