// Persistent bitmaps outlive the process and the host, or say that they did not: after any death, a bitmap that is trusted contains
// every granule that differs from what the disk held when it was added, and the image has no corruption. Lives of
// random length end while bitmaps are added, changed, saved or removed, while the guest writes, and while the image opens.

import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { getUint32, setUint32 } from '../../src/base/bytes.ts'
import { Random, seedOfRun } from '../../src/base/random.ts'
import { roundDown } from '../../src/base/round.ts'
import { Bitmap } from '../../src/bitmap/bitmap.ts'
import type { BlockDevice } from '../../src/block/device.ts'
import { isBlockError } from '../../src/block/error.ts'
import { createQcow2 } from '../../src/format/qcow2/create.ts'
import { openQcow2, type Qcow2Image } from '../../src/format/qcow2/image.ts'
import { SimulatedHost } from '../../src/host/simulated.ts'

const PATH = '/disk'
const SECTOR = 512

async function contentOf(device: BlockDevice): Promise<Buffer> {
  const bytes = Buffer.alloc(device.size)
  await device.read(0, bytes.length, bytes, 0)
  return bytes
}

/** The granules in which the disk differs from what it held before, shorter perhaps: growth is no change of a granule. */
function differences(before: Buffer, b: Buffer, granule: number): Bitmap {
  const a = Buffer.concat([before, Buffer.alloc(b.length - before.length)])
  const bitmap = new Bitmap(b.length, granule)
  for (let at = 0; at < b.length; at += SECTOR)
    if (!a.subarray(at, at + SECTOR).equals(b.subarray(at, at + SECTOR))) bitmap.set(at, SECTOR)
  return bitmap
}

interface Setting {
  readonly clusterSize: number
  readonly isLate: boolean
}

class Lives {
  readonly #random: Random
  readonly #host: SimulatedHost
  readonly #note: string
  readonly #backing: string | undefined
  /** What the disk held when each bitmap was added or cleared; undefined for those that missed changes on purpose. */
  readonly #baselines = new Map<string, Buffer | undefined>()
  #names = 0
  /** How often a bitmap was found trusted, and how often not. */
  readonly trust = { trusted: 0, lost: 0 }

  constructor(host: SimulatedHost, random: Random, note: string, backing: string | undefined) {
    this.#host = host
    this.#random = random
    this.#note = note
    this.#backing = backing
  }

  /** From opening to a clean close or a death. */
  async live(): Promise<void> {
    const random = this.#random
    const last = this.#host.operations + random.between(1, random.chance(0.5) ? 60 : 600)
    const fate = random.below(4)
    if (fate > 0)
      this.#host.beforeOperation = ({ number }) => {
        if (number !== last) return
        if (fate === 1) this.#host.killProcess()
        else this.#host.crash(fate === 2 && random.chance(0.3) ? 'none' : random)
      }
    try {
      const image = await openQcow2(this.#host, PATH, { name: 'disk' })
      await image.setAccess('write')
      for (let step = random.below(12); step > 0; step--) await this.#step(image)
      await image.close()
    } catch (error) {
      if (!isBlockError(error, 'closed')) throw error
      // Also the handle of a life that ended in the middle of a call.
    }
    this.#host.beforeOperation = undefined
    await this.#judge()
  }

  async #step(image: Qcow2Image): Promise<void> {
    const random = this.#random
    const usable = image.bitmaps.filter(({ isConsistent }) => isConsistent)
    const any = usable[random.below(Math.max(1, usable.length))]?.name
    const kind = random.below(14)
    if (kind < 7) return this.#change(image)
    if (kind === 7) return image.flush()
    if (kind === 8 && image.bitmaps.length < 5) {
      const name = `b${this.#names++}`
      this.#baselines.set(name, await contentOf(image))
      return image.bitmapEdits.add(name, random.pick([512, 4096, 65_536]), true)
    }
    if (any === undefined) return
    if (kind === 9) return image.bitmapEdits.remove(any)
    if (kind === 10) {
      // Cleared or not, the older of two moments has to be covered, so that a baseline is moved once it is done.
      const now = await contentOf(image)
      await image.bitmapEdits.clear(any)
      if (image.bitmaps.find(({ name }) => name === any)?.isRecording === true) this.#baselines.set(any, now)
      else this.#baselines.set(any, undefined)
      return
    }
    if (kind === 11) return image.grow(image.size + 512 * random.between(0, 40))
    if (kind === 12) {
      const from = await image.readBitmap(random.pick(usable).name)
      return image.bitmapEdits.merge(any, from)
    }
    this.#baselines.set(any, undefined)
    return image.bitmapEdits.setRecording(any, random.chance(0.5))
  }

  async #change(image: Qcow2Image): Promise<void> {
    const random = this.#random
    const offset = roundDown(random.below(image.size), SECTOR)
    const length = Math.min(image.size - offset, SECTOR * random.between(1, 30))
    const kind = random.below(5)
    if (kind === 0) await image.zero(offset, length, random.chance(0.5) ? 2 : 0)
    else if (kind === 1) await image.trim(offset, length, 0)
    else await image.write(offset, length, random.fill(new Uint8Array(length)), 0, 0)
  }

  async #judge(): Promise<void> {
    const image = await openQcow2(this.#host, PATH, { name: 'disk' })
    const now = await contentOf(image)
    const lost: string[] = []
    for (const { name, granularity, isConsistent } of image.bitmaps) {
      if (!isConsistent) {
        await assert.rejects(image.readBitmap(name), (error) => isBlockError(error, 'corrupt'))
        lost.push(name)
        continue
      }
      const bits = await image.readBitmap(name)
      const baseline = this.#baselines.get(name)
      this.trust.trusted++
      if (baseline === undefined) continue
      const missing = differences(baseline, now, granularity)
      missing.andNot(bits)
      assert.equal(
        missing.count,
        0,
        `${this.#note}: ${name} misses ${missing.count} granules, first ${missing.nextSet(0)}`,
      )
    }
    await image.setAccess('write')
    const { corruptions, leaks, problems } = await image.check()
    assert.deepEqual([corruptions, leaks], [0, 0], `${this.#note}: ${problems.join('\n')}`)
    this.trust.lost += lost.length
    for (const name of lost) await image.bitmapEdits.remove(name)
    await image.close()
    const closed = await openQcow2(this.#host, PATH, { name: 'disk' })
    const after = await closed.check()
    assert.deepEqual([after.corruptions, after.leaks], [0, 0], `${this.#note}, closed: ${after.problems.join('\n')}`)
    assert.equal(closed.backingReference?.name, this.#backing)
    await closed.close()
  }
}

/**
 * Puts an unknown header extension in a new image, so long that the one of the bitmaps, which comes after it, lies across the
 * border of two sectors.
 */
async function lengthenHeader(host: SimulatedHost): Promise<void> {
  const file = await host.open(PATH, { write: true })
  const header = new Uint8Array(SECTOR)
  await file.read(0, header.length, header, 0)
  const at = getUint32(header, 100)
  assert.equal(getUint32(header, at), 0, 'no extension yet')
  setUint32(header, at, 0x1234_5678)
  setUint32(header, at + 4, SECTOR - 16 - (at + 8))
  await file.write(0, header.length, header, 0)
  await file.sync()
  await file.close()
}

const LIVES = 250

suite('persistent bitmaps outlive the process and the host, or say that they did not', () => {
  const seed = seedOfRun()
  const settings: Setting[] = [512, 4096, 65_536].flatMap((clusterSize) => [
    { clusterSize, isLate: false },
    { clusterSize, isLate: true },
  ])
  for (const { clusterSize, isLate } of settings) {
    test(`clusters of ${clusterSize}${isLate ? ', operations completing late' : ''}`, async (t) => {
      t.diagnostic(`VARVE_SEED=${seed}`)
      const random = new Random(seed + clusterSize + (isLate ? 1 : 0))
      const host = new SimulatedHost(isLate ? { scheduler: new Random(seed + 1) } : {})
      // The name of a backing file has to make room for the bitmaps.
      const below = clusterSize === 4096 ? undefined : { name: 'b'.repeat(60), format: 'raw' }
      await createQcow2(host, PATH, {
        size: 200 * SECTOR,
        clusterSize,
        ...(below === undefined ? {} : { backing: below }),
      })
      if (clusterSize === 4096) await lengthenHeader(host)
      const lives = new Lives(host, random, `seed ${seed}, clusters of ${clusterSize}`, below?.name)
      for (let life = 0; life < LIVES; life++) await lives.live()
      const { trusted, lost } = lives.trust
      assert.ok(trusted > 20 && lost > 8, `${trusted} trusted, ${lost} lost: both should be common`)
      t.diagnostic(`${LIVES} lives, bitmaps found trusted ${trusted} times and lost ${lost} times`)
    })
  }

  for (const clusterSize of [512, 4096]) {
    test(`a death at every operation of adding, saving and removing: clusters of ${clusterSize}`, async (t) => {
      t.diagnostic(`VARVE_SEED=${seed}`)
      const random = new Random(seed)
      const before = new SimulatedHost()
      await createQcow2(before, PATH, { size: 200 * SECTOR, clusterSize })
      if (clusterSize === 4096) await lengthenHeader(before)
      const image = await openQcow2(before, PATH, { name: 'disk' })
      await image.setAccess('write')
      await image.bitmapEdits.add('kept', 512, true)
      await image.write(0, SECTOR, Buffer.alloc(SECTOR, 1), 0, 0)
      await image.close()
      let deaths = 0
      for (let isDead = true; isDead; deaths++) {
        for (const keep of ['killed', 'none', 'all', random, random, random, random] as const) {
          const host = before.clone()
          const last = host.operations + 1 + deaths
          isDead = false
          host.beforeOperation = ({ number }) => {
            if (number !== last) return
            isDead = true
            if (keep === 'killed') host.killProcess()
            else host.crash(keep)
          }
          try {
            await addSaveAndRemove(host)
          } catch (error) {
            if (!isBlockError(error, 'closed')) throw error
          }
          host.beforeOperation = undefined
          await judgeAddition(
            host,
            `seed ${seed}, operation ${deaths}, ${typeof keep === 'string' ? keep : 'some kept'}`,
          )
        }
      }
      assert.ok(deaths > 20, `${deaths} operations`)
    })
  }
})

async function addSaveAndRemove(host: SimulatedHost): Promise<void> {
  const image = await openQcow2(host, PATH, { name: 'disk' })
  await image.setAccess('write')
  await image.bitmapEdits.add('more', 512, true)
  await image.write(SECTOR, SECTOR, Buffer.alloc(SECTOR, 2), 0, 0)
  const bits = new Bitmap(image.size, 512)
  bits.set(0, 5 * SECTOR)
  await image.bitmapEdits.save([{ name: 'saved', bits, isRecording: false }])
  await image.bitmapEdits.remove('kept')
  await image.setAccess('read')
  await image.setAccess('write')
  await image.bitmapEdits.remove('saved')
  await image.bitmapEdits.remove('more')
  await image.close()
}

async function judgeAddition(host: SimulatedHost, note: string): Promise<void> {
  const image = await openQcow2(host, PATH, { name: 'disk' })
  const content = await contentOf(image)
  const expected: Readonly<Record<string, readonly number[]>> = {
    kept: content[SECTOR] === 0 ? [0] : [0, 1],
    more: content[SECTOR] === 0 ? [] : [1],
    saved: [0, 1, 2, 3, 4],
  }
  for (const { name, isConsistent } of image.bitmaps) {
    assert.ok(name in expected, `${note}: a bitmap that never was`)
    if (!isConsistent) continue
    const bits = await image.readBitmap(name)
    for (const granule of expected[name] ?? [])
      assert.ok(bits.has(granule), `${note}: ${name} misses granule ${granule}`)
  }
  await image.setAccess('write')
  const { corruptions, leaks, problems } = await image.check()
  assert.deepEqual([corruptions, leaks], [0, 0], `${note}: ${problems.join('\n')}`)
  await image.close()
}
