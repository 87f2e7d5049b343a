// A conversion dies at every one of its operations, by a kill or by a power loss: under the target's name there is what was there
// before, or the whole new image, and never anything between. When an operation merely fails, nothing half made stays.

import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { Random, seedOfRun } from '../../src/base/random.ts'
import { BlockError, isBlockError } from '../../src/block/error.ts'
import type { Format } from '../../src/chain/open.ts'
import { SimulatedHost } from '../../src/host/simulated.ts'
import { type ConvertOptions, convertImage } from '../../src/image/convert.ts'
import { createImage } from '../../src/image/create.ts'
import { openImage } from '../../src/image/open-image.ts'
import { readWhole } from '../support/lab.ts'

const KIB = 1024
const SIZE = 200 * KIB
const SOURCE = '/images/source'
const TARGET = '/images/target'

/** A raw source with noise, text, zeros and holes, and a target that is there already. */
async function makeHost(random: Random): Promise<{ host: SimulatedHost; content: Buffer }> {
  const host = new SimulatedHost()
  await host.makeFolder('/images')
  const content = Buffer.alloc(SIZE)
  random.fill(content.subarray(4 * KIB, 40 * KIB))
  content.fill('text ', 90 * KIB, 140 * KIB)
  const file = await host.open(SOURCE, { write: true, create: 'exclusive' })
  await file.write(0, SIZE, content, 0)
  await file.close()
  await createImage({ host, path: TARGET, format: 'raw', settings: { size: 512 } })
  await host.syncFolder('/images')
  return { host, content }
}

function convert(host: SimulatedHost, more: Partial<ConvertOptions>): Promise<unknown> {
  const sources = [{ host, path: SOURCE, format: 'raw' as const }]
  return convertImage({ host, sources, target: TARGET, format: 'raw', force: true, ...more })
}

/** True when the target is the new image, whole; false when it is the old one. */
async function isNew(host: SimulatedHost, format: Format, content: Buffer, note: string): Promise<boolean> {
  const status = await host.status(TARGET)
  assert.ok(status !== undefined, note)
  if (status.size === 512) return false
  const chain = await openImage({ host, path: TARGET, format })
  try {
    assert.ok((await readWhole(chain)).equals(content), `${note}: the content is whole`)
  } finally {
    await chain.close()
  }
  return true
}

const CONVERSIONS: Readonly<Record<string, Partial<ConvertOptions> & { format: Format }>> = {
  'to raw': { format: 'raw' },
  'to qcow2': { format: 'qcow2', settings: { clusterSize: 4 * KIB } },
  'to compressed qcow2': { format: 'qcow2', settings: { clusterSize: 16 * KIB }, compress: true },
}

suite('A conversion', () => {
  for (const [name, options] of Object.entries(CONVERSIONS)) {
    test(`${name} that dies anywhere leaves the old target or the whole new one`, async (t) => {
      const random = new Random(seedOfRun())
      t.diagnostic(`VARVE_SEED=${random.seed}`)
      const { host, content } = await makeHost(random)
      for (let step = 1, isDone = false; !isDone; step++) {
        const dying = host.clone()
        const last = dying.operations + step
        const keep = random.chance(0.3) ? 'none' : random
        const isPowerLoss = random.chance(0.7)
        dying.beforeOperation = ({ number }) => {
          if (number !== last) return
          if (isPowerLoss) dying.crash(keep)
          else dying.killProcess()
        }
        const note = `step ${step}, ${isPowerLoss ? 'power loss' : 'kill'}`
        try {
          await convert(dying, options)
          isDone = true
        } catch (error) {
          assert.ok(isBlockError(error, 'closed'), `${note}: ${String(error)}`)
        }
        dying.beforeOperation = undefined
        const found = await isNew(dying, options.format, content, note)
        if (!isDone) continue
        // What was said to be done is durable.
        assert.ok(found)
        dying.crash('none')
        assert.ok(await isNew(dying, options.format, content, 'after the end'))
      }
    })

    test(`${name} of which any operation fails leaves the old target and nothing else`, async () => {
      const { host, content } = await makeHost(new Random(92))
      for (let step = 1, isDone = false; !isDone; step++) {
        const failing = host.clone()
        const wrong = failing.operations + step
        failing.beforeOperation = ({ number, path }) => {
          if (number === wrong) throw new BlockError('no-space', `${path}: no space left`, { path })
        }
        try {
          await convert(failing, options)
          isDone = failing.operations < wrong
        } catch (error) {
          assert.ok(isBlockError(error, 'no-space'), String(error))
        }
        failing.beforeOperation = undefined
        const found = await isNew(failing, options.format, content, `step ${step}`)
        const names = await failing.list('/images')
        // Only when the new image has the name already may it be the last step that failed.
        assert.deepEqual(names, ['source', 'target'], `step ${step}`)
        assert.ok(!isDone || found)
      }
    })
  }
})
