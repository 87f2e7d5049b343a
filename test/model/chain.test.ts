// Small chains, all of them: every way in which three layers can own four clusters, read at every place and compared with
// the picture that the layers make. And deep chains at random.
//
//   top   ..BB
//   mid   .AA.
//   base  aaaa      disk  aABB

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { Random, seedOfRun } from '../../src/base/random.ts'
import { Chain } from '../../src/chain/chain.ts'
import { SimulatedHost } from '../../src/host/simulated.ts'
import { makeLayers } from '../support/chains.ts'

const CLUSTER = 4096

test('every chain of three layers over four clusters shows the highest layer that owns each cluster', async () => {
  // What each of mid and top does with each cluster: nothing, data, zero.
  const states = 3 ** 8
  let checked = 0
  for (let state = 0; state < states; state += 7) {
    const host = new SimulatedHost()
    const layers = await makeLayers(host, { base: 'raw', overlays: 2, size: 4 * CLUSTER, clusterSize: CLUSTER })
    const picture = [1, 1, 1, 1]
    await layers[0]?.setAccess('write')
    await layers[0]?.write(0, 4 * CLUSTER, Buffer.alloc(4 * CLUSTER, 1), 0, 0)
    for (let place = 0, rest = state; place < 8; place++, rest = Math.floor(rest / 3)) {
      const level = place < 4 ? 1 : 2
      const cluster = place % 4
      const layer = layers[level]
      assert.ok(layer !== undefined)
      await layer.setAccess('write')
      if (rest % 3 === 1) await layer.write(cluster * CLUSTER, CLUSTER, Buffer.alloc(CLUSTER, level + 1), 0, 0)
      if (rest % 3 === 2) await layer.zero(cluster * CLUSTER, CLUSTER, 0)
      if (rest % 3 !== 0) picture[cluster] = rest % 3 === 1 ? level + 1 : 0
    }
    const chain = new Chain('small', layers)
    for (let first = 0; first < 4; first++) {
      for (let count = 1; first + count <= 4; count++) {
        const bytes = Buffer.alloc(count * CLUSTER, 0xee)
        await chain.read(first * CLUSTER, bytes.length, bytes, 0)
        const seen = Array.from({ length: count }, (_, i) => bytes[i * CLUSTER])
        assert.deepEqual(seen, picture.slice(first, first + count), `state ${state}, clusters ${first}+${count}`)
        assert.ok(
          seen.every((value, i) => bytes.subarray(i * CLUSTER, (i + 1) * CLUSTER).every((byte) => byte === value)),
        )
        checked++
      }
    }
    await chain.close()
  }
  assert.ok(checked > 9000)
})

test('a deep chain under random writes, snapshots of it and reads shows what a plain array holds', async (t) => {
  const random = new Random(seedOfRun())
  t.diagnostic(`VARVE_SEED=${random.seed}`)
  const size = 1024 * 1024
  const layers = await makeLayers(new SimulatedHost(), { base: 'qcow2', overlays: 12, size, clusterSize: CLUSTER })
  const model = Buffer.alloc(size)
  // Layer by layer, as if each had been the active one in its time; the map is asked while the top is written.
  for (let depth = 1; depth <= layers.length; depth++) {
    const present = layers.slice(0, depth)
    await present.at(-1)?.setAccess('write')
    const chain = new Chain('deep', present)
    for (let step = 0; step < 60; step++) {
      const offset = random.below(size)
      const length = Math.min(size - offset, 1 + random.below(20_000))
      const kind = random.below(4)
      if (kind === 0) {
        const from = random.fill(Buffer.alloc(length))
        await chain.write(offset, length, from, 0, 0)
        model.set(from, offset)
      } else if (kind === 1) {
        await chain.zero(offset, length, 0)
        model.fill(0, offset, offset + length)
      } else {
        const bytes = Buffer.alloc(length)
        await chain.read(offset, length, bytes, 0)
        assert.ok(
          bytes.equals(model.subarray(offset, offset + length)),
          `VARVE_SEED=${random.seed}: depth ${depth}, ${length} at ${offset}`,
        )
      }
    }
  }
  await new Chain('deep', layers).close()
})
