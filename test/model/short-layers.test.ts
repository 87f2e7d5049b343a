// Chains whose images are not all of one size, as QEMU makes them: past its end an image shows zeros, and hides what a longer
// one below it holds there. So the disk reads, and so it still reads when layers have been merged.
//
//   top   . . . . . . B .
//   mid   . A . .
//   base  a a a a a a          disk  a A a a 0 0 B 0

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { Random, seedOfRun } from '../../src/base/random.ts'
import { Chain } from '../../src/chain/chain.ts'
import { openChain } from '../../src/chain/open.ts'
import { createQcow2 } from '../../src/format/qcow2/create.ts'
import { openQcow2 } from '../../src/format/qcow2/image.ts'
import type { Host } from '../../src/host/host.ts'
import { SimulatedHost } from '../../src/host/simulated.ts'
import { Lab, readWhole } from '../support/lab.ts'

const CLUSTER = 65_536

async function makeImage(host: Host, path: string, clusters: number, backing?: string): Promise<void> {
  const below = backing === undefined ? {} : { backing: { name: backing, format: 'qcow2' } }
  await createQcow2(host, path, { size: clusters * CLUSTER, ...below })
}

async function writeClusters(host: Host, path: string, clusters: readonly number[], value: number): Promise<void> {
  const image = await openQcow2(host, path, { name: path })
  await image.setAccess('write')
  for (const cluster of clusters) await image.write(cluster * CLUSTER, CLUSTER, Buffer.alloc(CLUSTER, value), 0, 0)
  await image.close()
}

/** The value of each cluster, all of whose bytes are the same. */
function valuesOf(bytes: Buffer): number[] {
  const values: number[] = []
  for (let at = 0; at < bytes.length; at += CLUSTER) {
    const cluster = bytes.subarray(at, at + CLUSTER)
    const value = cluster[0] as number
    assert.ok(cluster.every((byte) => byte === value))
    values.push(value)
  }
  return values
}

test('an image shows zeros past its end, whatever a longer one below it holds there', async (t) => {
  const random = new Random(seedOfRun())
  t.diagnostic(`VARVE_SEED=${random.seed}`)
  for (let round = 0; round < 20; round++) {
    const host = new SimulatedHost()
    await host.makeFolder('/images')
    let picture: number[] = []
    const depth = random.between(2, 5)
    for (let level = 0; level < depth; level++) {
      const clusters = random.between(1, 12)
      const path = `/images/${level}`
      await makeImage(host, path, clusters, level === 0 ? undefined : String(level - 1))
      const written = Array.from({ length: clusters }, (_, i) => i).filter(() => random.chance(level === 0 ? 0.9 : 0.2))
      await writeClusters(host, path, written, level + 1)
      const below = picture
      picture = Array.from({ length: clusters }, (_, i) => (written.includes(i) ? level + 1 : (below[i] ?? 0)))
    }
    const layers = await openChain({ host, path: `/images/${depth - 1}`, format: 'qcow2' })
    const chain = new Chain('uneven', layers)
    assert.deepEqual(valuesOf(await readWhole(chain)), picture, `VARVE_SEED=${random.seed}, round ${round}`)
    await chain.close()
  }
})

const MERGES = [
  { what: 'all layers', from: undefined, to: undefined },
  { what: 'the middle layer', from: '/images/mid', to: '/images/base' },
]

for (const { what, from, to } of MERGES) {
  test(`a disk with a short middle layer reads as before when ${what} went down into the base`, async () => {
    const lab = await Lab.create()
    const { host, engine } = lab
    await makeImage(host, '/images/base', 6)
    await writeClusters(host, '/images/base', [0, 1, 2, 3, 4, 5], 1)
    await makeImage(host, '/images/mid', 4, 'base')
    await writeClusters(host, '/images/mid', [1], 2)
    await makeImage(host, '/images/top', 8, 'mid')
    await writeClusters(host, '/images/top', [6], 3)
    await engine.addDisk('uneven', '/images/top', 'qcow2')
    const picture = [1, 2, 1, 1, 0, 0, 3, 0]
    assert.deepEqual(valuesOf(await readWhole(lab.guest('uneven'))), picture)
    await engine.commit('uneven', from, to)
    await lab.jobsEnd()
    assert.deepEqual(valuesOf(await readWhole(lab.guest('uneven'))), picture)
    await lab.stop()
    await lab.start()
    assert.deepEqual(valuesOf(await readWhole(lab.guest('uneven'))), picture)
    await lab.stop()
  })
}
