import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { BlockError, isBlockError } from '../../block/error.ts'
import { SimulatedHost } from '../../host/simulated.ts'
import { createQcow2 } from './create.ts'
import { openQcow2, type Qcow2Image } from './image.ts'

const MIB = 1024 * 1024
const CLUSTER = 65_536

/** An image, and how often its host was asked to sync. */
async function counted(version: 2 | 3): Promise<{ host: SimulatedHost; image: Qcow2Image; syncs: () => number }> {
  const host = new SimulatedHost()
  await createQcow2(host, '/disk', { size: 64 * MIB, version })
  const image = await openQcow2(host, '/disk', { name: 'disk' })
  await image.setAccess('write')
  let count = 0
  host.beforeOperation = ({ kind }) => {
    if (kind === 'sync') count++
  }
  return { host, image, syncs: () => count }
}

suite('one sync serves many', () => {
  for (const version of [2, 3] as const) {
    test(`32 flushes at once take two at most: version ${version}`, async () => {
      const { image, syncs } = await counted(version)
      const bytes = Buffer.alloc(4096, 1)
      await image.write(0, bytes.length, bytes, 0, 0)
      const before = syncs()
      await Promise.all(Array.from({ length: 32 }, () => image.flush()))
      assert.ok(syncs() - before >= 1 && syncs() - before <= 2, `${syncs() - before} syncs`)
      await image.close()
    })

    test(`32 writers that each write and flush take a few: version ${version}`, async () => {
      const { image, syncs } = await counted(version)
      const bytes = Buffer.alloc(4096, 1)
      await image.write(0, bytes.length, bytes, 0, 0)
      const before = syncs()
      const writers = Array.from({ length: 32 }, async (_, writer) => {
        await image.write(writer * CLUSTER, bytes.length, bytes, 0, 0)
        await image.flush()
      })
      await Promise.all(writers)
      assert.ok(syncs() - before <= 4, `${syncs() - before} syncs`)
      await image.close()
    })
  }

  test('new clusters of version 2 take a sync for many of them', async () => {
    const { image, syncs } = await counted(2)
    const bytes = Buffer.alloc(CLUSTER, 1)
    for (let cluster = 0; cluster < 960; cluster++) await image.write(cluster * CLUSTER, CLUSTER, bytes, 0, 0)
    // 64, 128, 256, 512 and 1024 clusters.
    assert.ok(syncs() <= 5, `${syncs()} syncs`)
    await image.close()
  })

  test('and its failure is every one’s, from then on', async () => {
    const { host, image } = await counted(2)
    await image.write(0, 512, Buffer.alloc(512, 1), 0, 0)
    host.beforeOperation = ({ kind, path }) => {
      if (kind === 'sync') throw new BlockError('io', `${path}: made to fail`, { path })
    }
    const flushes = Array.from({ length: 5 }, async () => image.flush())
    for (const flush of flushes) await assert.rejects(flush, (error) => isBlockError(error, 'io'))
    host.beforeOperation = undefined
    await assert.rejects(
      async () => image.flush(),
      (error) => isBlockError(error, 'io'),
    )
    // Clusters whose counting may not have arrived are not given out.
    const all = Buffer.alloc(8 * MIB, 2)
    await assert.rejects(
      async () => image.write(MIB, all.length, all, 0, 0),
      (error) => isBlockError(error, 'io'),
    )
    await assert.rejects(image.close(), (error) => isBlockError(error, 'io'))
  })
})
