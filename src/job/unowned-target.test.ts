import assert from 'node:assert/strict'
import { test } from 'node:test'
import { type Layer, MAY_UNMAP, OWNED_ZERO } from '../block/device.ts'
import { createQcow2 } from '../format/qcow2/create.ts'
import { openChain } from '../chain/open.ts'
import { SimulatedHost } from '../host/simulated.ts'
import { UnownedTarget } from './unowned-target.ts'

const CLUSTER = 65_536
const SIZE = 4 * CLUSTER

/** An image that owns its second cluster, over a base of ones. */
async function makeTarget(version: 2 | 3): Promise<Layer> {
  const host = new SimulatedHost()
  await createQcow2(host, '/base', { size: SIZE })
  await createQcow2(host, '/top', { size: SIZE, version, backing: { name: 'base', format: 'qcow2' } })
  const [base, top] = (await openChain({ host, path: '/top', format: 'qcow2' })) as [Layer, Layer]
  await base.setAccess('write')
  await base.write(0, SIZE, Buffer.alloc(SIZE, 1), 0, 0)
  await top.setAccess('write')
  await top.write(CLUSTER, CLUSTER, Buffer.alloc(CLUSTER, 2), 0, 0)
  return top
}

async function values(layer: Layer): Promise<(number | undefined)[]> {
  const bytes = Buffer.alloc(SIZE)
  await layer.read(0, SIZE, bytes, 0)
  return [0, 1, 2, 3].map((cluster) => bytes[cluster * CLUSTER])
}

async function ownership(layer: Layer, cluster: number): Promise<number> {
  let found = -1
  await layer.allocation(cluster * CLUSTER, CLUSTER, (_length, owned) => {
    found = owned
    return false
  })
  return found
}

test('a write reaches only what the layer does not own', async () => {
  const layer = await makeTarget(3)
  const target = new UnownedTarget({ layer, device: layer, keepsZeros: true })
  await target.write(0, 3 * CLUSTER, Buffer.alloc(3 * CLUSTER, 3), 0, 0)
  assert.deepEqual(await values(layer), [3, 2, 3, 1])
})

for (const version of [2, 3] as const) {
  test(`zeros are kept where the layer owns nothing, in an image of version ${version} too`, async () => {
    const layer = await makeTarget(version)
    await new UnownedTarget({ layer, device: layer, keepsZeros: true }).zero(0, 3 * CLUSTER, MAY_UNMAP)
    assert.deepEqual(await values(layer), [0, 2, 0, 1])
    assert.equal((await ownership(layer, 0)) === OWNED_ZERO, version === 3)
  })
}

test('zeros of version 2 that show through already are written down, since something else may come below', async () => {
  const layer = await makeTarget(2)
  await layer.backing?.zero(0, CLUSTER, MAY_UNMAP)
  await new UnownedTarget({ layer, device: layer, keepsZeros: true }).zero(0, CLUSTER, MAY_UNMAP)
  layer.backing = undefined
  assert.notEqual(await ownership(layer, 0), 0)
})

test('zeros are left out where nothing will show through', async () => {
  const layer = await makeTarget(3)
  await new UnownedTarget({ layer, device: layer, keepsZeros: false }).zero(0, SIZE, MAY_UNMAP)
  assert.equal(await ownership(layer, 0), 0)
})
