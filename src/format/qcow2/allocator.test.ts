import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { Random } from '../../base/random.ts'
import { SimulatedHost } from '../../host/simulated.ts'
import type { Host } from '../../host/host.ts'
import { createQcow2 } from './create.ts'
import { openQcow2, type Qcow2Image } from './image.ts'

const MIB = 1024 * 1024

async function open(host: Host): Promise<Qcow2Image> {
  const image = await openQcow2(host, '/disk', { name: 'disk' })
  await image.setAccess('write')
  return image
}

async function contentOf(image: Qcow2Image): Promise<Buffer> {
  const bytes = Buffer.alloc(image.size)
  await image.read(0, bytes.length, bytes, 0)
  return bytes
}

async function assertClean(image: Qcow2Image): Promise<void> {
  const { corruptions, leaks, problems } = await image.check()
  assert.deepEqual([corruptions, leaks], [0, 0], problems.join('\n'))
}

/** The same files, but '/disk' looks like a host block device of a fixed length, full of old bytes after what it holds. */
async function asBlockDevice(host: SimulatedHost, length: number): Promise<Host> {
  const file = await host.open('/disk', { write: true })
  const end = file.size()
  await file.write(end, length - end, Buffer.alloc(length - end, 0xaa), 0)
  await file.sync()
  await file.close()
  return new Proxy(host, {
    get(target, property) {
      if (property === 'status') return async (path: string) => ({ ...(await target.status(path)), kind: 'block' })
      const value: unknown = Reflect.get(target, property)
      return typeof value === 'function' ? value.bind(target) : value
    },
  })
}

suite('clusters are allocated', () => {
  test('on a block device, within its length, never showing the old bytes there', async () => {
    const simulated = new SimulatedHost()
    await createQcow2(simulated, '/disk', { size: 4 * MIB, clusterSize: 4096 })
    const host = await asBlockDevice(simulated, 2 * MIB)
    const image = await open(host)
    const model = Buffer.alloc(4 * MIB)
    const random = new Random(1)
    for (let i = 0; i < 300; i++) {
      const offset = random.below(1800) * 1024
      const bytes = random.fill(Buffer.alloc(700))
      await image.write(offset, bytes.length, bytes, 0, 0)
      model.set(bytes, offset)
    }
    assert.ok((await contentOf(image)).equals(model))
    await assert.rejects(async () => image.write(0, 4 * MIB, Buffer.alloc(4 * MIB, 1), 0, 0), { kind: 'no-space' })
    model.set(await contentOf(image))
    simulated.killProcess()
    const again = await open(host)
    assert.ok((await contentOf(again)).equals(model))
    await assertClean(again)
    await again.close()
    assert.equal((await simulated.status('/disk'))?.size, 2 * MIB)
  })

  test('with a refcount table that grows many times', async () => {
    const host = new SimulatedHost()
    await createQcow2(host, '/disk', { size: 40 * MIB, clusterSize: 512 })
    const image = await open(host)
    const bytes = new Random(2).fill(Buffer.alloc(MIB))
    for (let i = 0; i < 40; i++) await image.write(i * MIB, MIB, bytes, 0, 0)
    // 64 blocks of 256 clusters is what the first table reaches: 8 MiB of the file.
    assert.ok(image.header.refcountTableClusters > 4)
    await assertClean(image)
    await image.close()
    const again = await open(host)
    await assertClean(again)
    const found = Buffer.alloc(MIB)
    for (let i = 0; i < 40; i++) {
      await again.read(i * MIB, MIB, found, 0)
      assert.ok(found.equals(bytes))
    }
    await again.close()
  })

  test('after a kill in the midst of growing, with refcounts rebuilt from nothing', async () => {
    const host = new SimulatedHost()
    await createQcow2(host, '/disk', { size: 40 * MIB, clusterSize: 512 })
    const image = await open(host)
    const bytes = new Random(3).fill(Buffer.alloc(MIB))
    for (let i = 0; i < 20; i++) await image.write(i * MIB, MIB, bytes, 0, 0)
    host.killProcess()
    const again = await open(host)
    await assertClean(again)
    const found = Buffer.alloc(MIB)
    await again.read(19 * MIB, MIB, found, 0)
    assert.ok(found.equals(bytes))
    await again.close()
  })
})
