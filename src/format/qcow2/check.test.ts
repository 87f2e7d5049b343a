import assert from 'node:assert/strict'
import { test } from 'node:test'
import { Random } from '../../base/random.ts'
import { SimulatedHost } from '../../host/simulated.ts'
import type { CheckResult } from './check.ts'
import { createQcow2 } from './create.ts'
import { openQcow2 } from './image.ts'
import { repairQcow2 } from './repair.ts'

const PATH = '/image.qcow2'
const CLUSTER = 512

/** An image with writes all over it; damaged ones by overwriting words of its file. */
async function damagedImage(seed: number, damages: number): Promise<SimulatedHost> {
  const host = new SimulatedHost()
  const random = new Random(seed)
  await createQcow2(host, PATH, { size: 4 * 2 ** 20, clusterSize: CLUSTER })
  const image = await openQcow2(host, PATH, { name: 'image' })
  await image.setAccess('write')
  for (let i = 0; i < 150; i++) {
    const bytes = random.fill(Buffer.alloc(random.between(1, 4 * CLUSTER)))
    await image.write(random.below(image.size - bytes.length), bytes.length, bytes, 0, 0)
  }
  await image.close()
  const file = await host.open(PATH, { write: true })
  for (let i = 0; i < damages; i++) {
    const place = CLUSTER * random.between(1, 6) + 8 * random.below(64)
    await file.write(place, 2, random.fill(Buffer.alloc(2)), 0)
  }
  await file.close()
  return host
}

async function check(host: SimulatedHost, window?: number): Promise<CheckResult> {
  const image = await openQcow2(host, PATH, { name: 'image' })
  const result = await image.check(window === undefined ? {} : { window })
  await image.close()
  return result
}

test('a check in many windows finds what a check in one finds', async () => {
  let found = 0
  for (let seed = 1; seed <= 20; seed++) {
    const host = await damagedImage(seed, seed % 5)
    const { problems: _all, ...whole } = await check(host)
    const { problems: _some, ...pieces } = await check(host, 256)
    assert.deepEqual(pieces, whole, `seed ${seed}`)
    found += whole.corruptions
  }
  assert.ok(found > 20, 'the damages show')
})

test('a repair leaves an image that a check finds sound, or says what is left', async () => {
  for (let seed = 1; seed <= 40; seed++) {
    const host = await damagedImage(seed, seed % 7)
    const result = await repairQcow2(host, PATH, 'all')
    const { found: _found, corruptionsFixed: _corruptions, leaksFixed: _leaks, ...after } = result
    assert.deepEqual(after, await check(host), `seed ${seed}`)
    assert.equal(after.problems.length > 0, after.corruptions + after.leaks + after.checkErrors > 0, `seed ${seed}`)
  }
})

test('the progress of a check ends with all that there was to do', async () => {
  const host = await damagedImage(1, 0)
  const image = await openQcow2(host, PATH, { name: 'image' })
  const seen: [number, number][] = []
  await image.check({ window: 512, progress: (done, total) => void seen.push([done, total]) })
  const [last] = seen.slice(-1)
  assert.ok(seen.length > 10)
  assert.equal(last?.[0], last?.[1])
  for (let i = 1; i < seen.length; i++) assert.ok((seen[i]?.[0] as number) >= (seen[i - 1]?.[0] as number))
  await image.close()
})
