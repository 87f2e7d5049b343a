// A repair of a qcow2 image that dies at any of its operations can be done again, and the disk then reads as it would have: after a
// kill, and after a power loss that keeps, tears and loses what was not synced.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { Random, seedOfRun } from '../../src/base/random.ts'
import { isBlockError } from '../../src/block/error.ts'
import { createQcow2 } from '../../src/format/qcow2/create.ts'
import { openQcow2 } from '../../src/format/qcow2/image.ts'
import { repairQcow2 } from '../../src/format/qcow2/repair.ts'
import { SimulatedHost } from '../../src/host/simulated.ts'
import { addTo, type Anatomy, clearBits, dissect, setBits } from '../support/qcow2-anatomy.ts'

const PATH = '/image'
const SIZE = 512 * 1024

/** What is done to the image's bytes. */
const DAMAGES: Readonly<Record<string, (image: Buffer, anatomy: Anatomy) => void>> = {
  'the refcount table is gone': (image, { refcountTable, clusterSize }) =>
    void image.fill(0, refcountTable, refcountTable + clusterSize),
  'the header has lost the refcount table': (image) => void image.writeBigUInt64BE(1n << 50n, 48),
  'the refcounts lead into the L1 table': (image, { refcountTable, l1 }) =>
    void image.writeBigUInt64BE(BigInt(l1), refcountTable),
  'refcounts and flags are wrong'(image, { refcountBlocks, dataEntries, l1 }) {
    image.fill(0x55, refcountBlocks[0] as number, (refcountBlocks[0] as number) + 40)
    for (const at of dataEntries.slice(0, 5)) clearBits(image, at, 1n << 63n)
    clearBits(image, l1, 1n << 63n)
  },
  'entries lead past the end'(image, { dataEntries }) {
    for (const at of dataEntries.slice(2, 6)) setBits(image, at, 1n << 42n)
  },
  'snapshots lack their extra data'(image, { snapshots, dataEntries }) {
    const [at = 0] = snapshots
    image.writeUInt16BE(image.readUInt16BE(at + 14) + image.readUInt32BE(at + 36), at + 14)
    image.writeUInt32BE(0, at + 36)
    setBits(image, dataEntries[0] as number, 1n << 57n)
  },
  'the bitmap directory is elsewhere': (image, { extensions }) =>
    addTo(image, (extensions.find(({ type }) => type === 0x2385_2875)?.at ?? 0) + 24, 512),
}

async function makeImage(random: Random): Promise<Buffer> {
  const host = new SimulatedHost()
  await createQcow2(host, PATH, { size: SIZE, clusterSize: 4096 })
  const image = await openQcow2(host, PATH, { name: 'image' })
  await image.setAccess('write')
  const write = async (): Promise<void> => {
    for (let i = 0; i < 10; i++) {
      const bytes = random.fill(Buffer.alloc(random.between(1, 9000)))
      await image.write(random.below(SIZE - bytes.length), bytes.length, bytes, 0, 0)
    }
  }
  await write()
  await image.createSnapshot('first')
  await image.bitmapEdits.add('changes', 4096, true)
  await write()
  await image.close()
  const file = await host.open(PATH)
  const bytes = Buffer.alloc(file.size())
  await file.read(0, bytes.length, bytes, 0)
  return bytes
}

async function hostWith(bytes: Buffer): Promise<SimulatedHost> {
  const host = new SimulatedHost()
  const file = await host.open(PATH, { write: true, create: 'exclusive' })
  await file.write(0, bytes.length, bytes, 0)
  await file.sync()
  await file.close()
  await host.syncFolder('/')
  return host
}

async function repaired(host: SimulatedHost, note: string): Promise<Buffer> {
  const { corruptions, leaks, checkErrors, problems } = await repairQcow2(host, PATH, 'all')
  assert.deepEqual([corruptions, leaks, checkErrors], [0, 0, 0], `${note}: ${problems.join('\n')}`)
  const image = await openQcow2(host, PATH, { name: 'image' })
  const bytes = Buffer.alloc(image.size)
  await image.read(0, bytes.length, bytes, 0)
  assert.equal(image.header.incompatible & 3, 0, 'neither dirty nor corrupt')
  assert.equal(image.snapshots.length, 1)
  await image.close()
  return bytes
}

for (const [name, damage] of Object.entries(DAMAGES)) {
  test(`a repair that dies at any operation is done again: ${name}`, async (t) => {
    const seed = seedOfRun()
    const random = new Random(seed)
    const bytes = await makeImage(random)
    damage(bytes, dissect(bytes))
    const expected = await repaired(await hostWith(bytes), 'undisturbed')
    let deaths = 0
    for (let isDone = false; !isDone; deaths++) {
      const host = await hostWith(bytes)
      const last = host.operations + deaths
      isDone = true
      host.beforeOperation = ({ number }) => {
        if (number <= last) return
        isDone = false
        host.beforeOperation = undefined
        if (deaths % 3 === 0) host.killProcess()
        else host.crash(deaths % 3 === 1 ? random : 'none')
      }
      await repairQcow2(host, PATH, 'all').catch((error: unknown) =>
        assert.ok(isBlockError(error, 'closed'), String(error)),
      )
      host.beforeOperation = undefined
      const note = `seed ${seed}, death ${deaths}`
      assert.ok((await repaired(host, note)).equals(expected), `${note}: the disk reads as it should`)
    }
    t.diagnostic(`seed ${seed}: ${deaths} deaths`)
  })
}
