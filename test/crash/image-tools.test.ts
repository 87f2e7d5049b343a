// The offline tools die at every one of their operations, by a kill or by a power loss: the disk of an overlay reads as before a
// commit or a rebase, wherever it was interrupted, and its images are without corruption. What ended is there.

import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { Random, seedOfRun } from '../../src/base/random.ts'
import { isBlockError } from '../../src/block/error.ts'
import type { Qcow2Image } from '../../src/format/qcow2/image.ts'
import { SimulatedHost } from '../../src/host/simulated.ts'
import { commitImage } from '../../src/image/commit.ts'
import { createImage } from '../../src/image/create.ts'
import { openImage } from '../../src/image/open-image.ts'
import { rebaseImage } from '../../src/image/rebase.ts'
import { resizeImage } from '../../src/image/resize.ts'
import { readWhole } from '../support/lab.ts'

const CLUSTER = 4096
const SIZE = 40 * CLUSTER
const TOP = '/images/top'

async function fill(host: SimulatedHost, path: string, random: Random): Promise<void> {
  const chain = await openImage({ host, path, format: 'qcow2' })
  try {
    await chain.active.setAccess('write')
    for (let i = 0; i < 12; i++) {
      const offset = random.below(chain.size - 3 * CLUSTER)
      const length = random.between(1, 3 * CLUSTER)
      if (random.chance(0.2)) await chain.active.zero(offset, length, 0)
      else await chain.active.write(offset, length, random.fill(new Uint8Array(length)), 0, 0)
    }
  } finally {
    await chain.close()
  }
}

/** base <- middle <- top, and another base. The middle is shorter than the others, and every image holds something. */
async function makeImages(random: Random, version: 2 | 3 = 3): Promise<SimulatedHost> {
  const host = new SimulatedHost()
  await host.makeFolder('/images')
  const images = [
    { name: 'base', size: SIZE - 5 * CLUSTER },
    { name: 'middle', size: SIZE - 8 * CLUSTER, below: 'base' },
    { name: 'top', size: SIZE, below: 'middle' },
    { name: 'other', size: SIZE - 2 * CLUSTER },
  ]
  for (const { name, size, below } of images) {
    const backing = below === undefined ? {} : { backingName: below, backingFormat: 'qcow2' as const }
    const settings = { size, clusterSize: CLUSTER, version, ...backing }
    await createImage({ host, path: `/images/${name}`, format: 'qcow2', settings })
    await fill(host, `/images/${name}`, random)
  }
  return host
}

interface State {
  readonly bytes: Buffer
  readonly below: string | undefined
}

async function stateOf(host: SimulatedHost, path = TOP): Promise<State> {
  await areSound(host.clone(), path)
  const chain = await openImage({ host, path, format: 'qcow2' })
  try {
    return { bytes: await readWhole(chain), below: chain.active.backingReference?.name }
  } finally {
    await chain.close()
  }
}

/** Whoever opens the images for writing, which completes their refcounts, finds nothing corrupt. */
async function areSound(host: SimulatedHost, path: string): Promise<void> {
  const chain = await openImage({ host, path, format: 'qcow2' })
  try {
    for (const layer of chain.layers) {
      await layer.setAccess('write')
      await layer.setAccess('read')
      const image = layer as Qcow2Image
      const { corruptions, leaks, problems } = await image.check()
      const note = `${layer.path}: ${problems.join('\n')}`
      // Version 2 does not say that it was not closed, so that what was lost stays lost.
      if (image.header.version === 3) assert.equal(leaks, 0, note)
      assert.equal(corruptions, 0, note)
    }
  } finally {
    await chain.close()
  }
}

type Run = (host: SimulatedHost) => Promise<unknown>

/** Runs the tool on copies of the host, of which each dies at one operation more; then looks at what is left. */
async function dieEverywhere(
  host: SimulatedHost,
  random: Random,
  run: Run,
  look: (host: SimulatedHost, note: string, isDone: boolean) => Promise<void>,
): Promise<number> {
  for (let step = 1; ; step++) {
    const dying = host.clone()
    const last = dying.operations + step
    const isPowerLoss = random.chance(0.7)
    const keep = random.chance(0.2) ? 'none' : random.chance(0.2) ? 'all' : random
    const die = (): void => (isPowerLoss ? dying.crash(keep) : dying.killProcess())
    let hasDied = false
    dying.beforeOperation = ({ number }) => {
      if (number !== last) return
      hasDied = true
      die()
    }
    try {
      await run(dying)
    } catch (error) {
      if (!isBlockError(error, 'closed')) throw error
    }
    dying.beforeOperation = undefined
    // What ended is durable at once.
    if (!hasDied) die()
    await look(dying, `step ${step}, ${isPowerLoss ? 'power loss' : 'kill'}`, !hasDied)
    if (!hasDied) return step
  }
}

const TOOLS: Readonly<
  Record<string, { readonly run: Run; readonly image?: string; readonly below: string | undefined }>
> = {
  'a commit into the backing file': {
    run: (host) => commitImage({ host, path: TOP, format: 'qcow2' }),
    below: 'middle',
  },
  'a commit into the lowest image': {
    run: (host) => commitImage({ host, path: TOP, format: 'qcow2', base: '/images/base' }),
    below: 'middle',
  },
  'a rebase onto another image': {
    run: (host) => rebaseImage({ host, path: TOP, format: 'qcow2', backing: { name: 'other', format: 'qcow2' } }),
    below: 'other',
  },
  'a rebase onto the image below': {
    run: (host) => rebaseImage({ host, path: TOP, format: 'qcow2', backing: { name: 'base', format: 'qcow2' } }),
    below: 'base',
  },
  'a rebase of an image that had no backing file': {
    run: (host) =>
      rebaseImage({ host, path: '/images/other', format: 'qcow2', backing: { name: 'base', format: 'qcow2' } }),
    image: '/images/other',
    below: 'base',
  },
  'a rebase onto nothing': {
    run: (host) => rebaseImage({ host, path: TOP, format: 'qcow2', backing: undefined }),
    below: undefined,
  },
}

suite('the offline tools may die at any moment', () => {
  const seed = seedOfRun()
  for (const [what, { run, image, below }] of Object.entries(TOOLS)) {
    for (const version of [3, 2] as const)
      test(`${what}, version ${version}, leaves the disk as it was`, async (t) => {
        t.diagnostic(`VARVE_SEED=${seed}`)
        const random = new Random(seed)
        const host = await makeImages(random, version)
        const before = await stateOf(host, image)
        const steps = await dieEverywhere(host, random, run, async (left, note, isDone) => {
          const after = await stateOf(left, image)
          assert.ok(after.bytes.equals(before.bytes), `seed ${seed}, ${note}: the disk has changed`)
          if (isDone) assert.equal(after.below, below, note)
          else assert.ok([before.below, below].includes(after.below), note)
          // Whoever goes on with the image finds it whole.
          await run(left).catch((error: unknown) => assert.ok(isBlockError(error, 'invalid-argument'), String(error)))
          assert.ok(
            (await stateOf(left, image)).bytes.equals(before.bytes),
            `seed ${seed}, ${note}: changed by the second run`,
          )
        })
        t.diagnostic(`${steps} moments`)
      })
  }

  test('a growing disk has its old size or the new one, and its data', async (t) => {
    t.diagnostic(`VARVE_SEED=${seed}`)
    const random = new Random(seed)
    const host = await makeImages(random)
    const before = await stateOf(host)
    const grown = Buffer.concat([before.bytes, Buffer.alloc(SIZE)])
    const run: Run = (dying) =>
      resizeImage({ host: dying, path: TOP, format: 'qcow2', change: { kind: 'by', bytes: SIZE } })
    await dieEverywhere(host, random, run, async (left, note, isDone) => {
      const { bytes } = await stateOf(left)
      const isOld = bytes.equals(before.bytes)
      assert.ok(isDone ? bytes.equals(grown) : isOld || bytes.equals(grown), `seed ${seed}, ${note}`)
    })
  })

  test('a new image in the place of an old one is the one or the other', async (t) => {
    t.diagnostic(`VARVE_SEED=${seed}`)
    const random = new Random(seed)
    const host = await makeImages(random)
    const before = await stateOf(host, '/images/other')
    const settings = { size: SIZE, clusterSize: CLUSTER }
    const run: Run = (dying) =>
      createImage({ host: dying, path: '/images/other', format: 'qcow2', settings, force: true })
    await dieEverywhere(host, random, run, async (left, note, isDone) => {
      const { bytes } = await stateOf(left, '/images/other')
      const isNew = bytes.equals(Buffer.alloc(SIZE))
      assert.ok(isNew || (!isDone && bytes.equals(before.bytes)), `seed ${seed}, ${note}`)
    })
  })
})
