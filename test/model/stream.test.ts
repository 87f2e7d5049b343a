// Live streams of whole engines on a simulated host: chains at random, of images of several sizes, cluster sizes and versions, any
// part of which is pulled up while a guest writes, zeroes and trims. The disk reads as a plain array says and the layers that
// stay show what they showed, also after a restart, when what went is gone.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { Random, seedOfRun } from '../../src/base/random.ts'
import type { BlockDevice } from '../../src/block/device.ts'
import { isBlockError } from '../../src/block/error.ts'
import { type Format, openChain } from '../../src/chain/open.ts'
import { createQcow2 } from '../../src/format/qcow2/create.ts'
import { openQcow2 } from '../../src/format/qcow2/image.ts'
import { createRaw } from '../../src/format/raw/raw.ts'
import { Lab, LAB_REPOSITORY, readWhole } from '../support/lab.ts'

const UNIT = 4096
const UNITS = 192
const SIZE = UNITS * UNIT
const ROUNDS = Number(process.env['VARVE_ROUNDS'] ?? 30)

/** Writes, zeroes or trims a range of the device, and of the array what came of it. */
async function change(device: BlockDevice, model: Buffer, random: Random): Promise<void> {
  const offset = random.below(device.size)
  const length = random.between(1, Math.min(device.size - offset, random.pick([100, UNIT, 20 * UNIT])))
  const kind = random.pick(['write', 'write', 'zero', 'trim'] as const)
  const bytes = Buffer.alloc(length, random.between(1, 255))
  if (kind === 'write') {
    await device.write(offset, length, bytes, 0, 0)
    model.set(bytes, offset)
    return
  }
  await device[kind](offset, length, random.below(2) * 2)
  await device.read(offset, length, bytes, 0)
  for (let at = 0; at < length; at++) {
    const mayBeOld = kind === 'trim' && bytes[at] === model[offset + at]
    assert.ok(bytes[at] === 0 || mayBeOld, `${kind} of ${length} at ${offset} left ${bytes[at]} at ${offset + at}`)
  }
  model.set(bytes, offset)
}

/** Makes the images of a chain, changed at random one after the other; returns the path and format of the highest. */
async function makeChain(lab: Lab, random: Random, depth: number): Promise<{ path: string; format: Format }> {
  let below: { name: string; format: Format } | undefined
  for (let level = 0; level < depth; level++) {
    const path = `/images/${level}`
    const format = level === 0 && random.chance(0.3) ? 'raw' : 'qcow2'
    const isUneven = level < depth - 1 && random.chance(0.4)
    const size = isUneven ? random.between(UNITS / 4, UNITS + 20) * UNIT : SIZE
    const version = random.chance(0.2) ? 2 : 3
    const clusterSize = random.pick([512, UNIT, 4 * UNIT, 16 * UNIT])
    const backing = below === undefined ? {} : { backing: below }
    if (format === 'raw') await createRaw(lab.host, path, size)
    else await createQcow2(lab.host, path, { size, clusterSize, version, ...backing })
    below = { name: String(level), format }
    const layers = await openChain({ host: lab.host, path, format })
    const layer = layers.at(-1)
    assert.ok(layer !== undefined)
    await layer.setAccess('write')
    const shown = await readWhole(layer)
    for (let step = 0; step < 12; step++) await change(layer, shown, random)
    for (const open of layers.toReversed()) await open.close()
  }
  return { path: `/images/${depth - 1}`, format: below?.format ?? 'qcow2' }
}

/** What each frozen layer shows of the disk, by its path. */
async function frozenViews(lab: Lab): Promise<Map<string, Buffer>> {
  const views = new Map<string, Buffer>()
  for (const layer of lab.disk('vm').chain.layers.slice(0, -1)) {
    views.set(layer.path, (await readWhole(layer)).subarray(0, SIZE))
  }
  return views
}

async function checkImages(lab: Lab, paths: readonly string[]): Promise<void> {
  for (const path of paths) {
    const image = await openQcow2(lab.host, path, { name: path })
    const { corruptions, leaks } = await image.check()
    await image.close()
    assert.deepEqual([corruptions, leaks], [0, 0], path)
  }
}

async function runRound(random: Random, isLate: boolean): Promise<void> {
  const lab = await Lab.create(isLate ? new Random(random.next()) : undefined)
  const depth = random.between(2, 5)
  const { path, format } = await makeChain(lab, random, depth)
  await lab.engine.addDisk('vm', path, format)
  const guest = lab.guest('vm')
  const model = await readWhole(guest)
  const to = random.between(1, depth - 1)
  const base = random.between(-1, to - 2)
  const paths = lab.engine.showDisk('vm').layers.map((layer) => layer.path)
  const views = await frozenViews(lab)
  const started = await lab.engine.stream('vm', paths[base], paths[to])
  const ended = lab.engine.jobEnded(started.id)
  let isRunning = true
  void ended.finally(() => (isRunning = false))
  while (isRunning) {
    await change(guest, model, random)
    if (random.chance(0.1)) await guest.flush()
    await new Promise((resolve) => setImmediate(resolve))
  }
  assert.equal((await ended).error, undefined)
  const left = [...paths.slice(0, base + 1), ...paths.slice(to)]
  const details = `chain of ${depth}, base ${base}, to ${to}`
  for (const restart of [false, true]) {
    if (restart) {
      await lab.stop()
      // Images of others stay where they are; nothing of the disk is in them any more.
      for (const gone of paths.slice(base + 1, to)) await lab.host.unlink(gone)
      await lab.start()
    }
    const status = lab.engine.showDisk('vm')
    assert.deepEqual([status.error, status.layers.map((layer) => layer.path)], [undefined, left])
    assert.ok((await readWhole(lab.guest('vm'))).equals(model), `${details}: the disk differs, restart ${restart}`)
    for (const [frozen, view] of await frozenViews(lab)) {
      assert.ok(view.equals(views.get(frozen) as Buffer), `${details}: ${frozen} differs, restart ${restart}`)
    }
  }
  await lab.stop()
  await checkImages(lab, left.slice(1))
}

test('any part of any chain is pulled up while a guest changes the disk, and nothing that is read changes', async (t) => {
  const random = new Random(seedOfRun())
  t.diagnostic(`VARVE_SEED=${random.seed}`)
  for (let round = 0; round < ROUNDS; round++) await runRound(random, round % 2 === 1)
})

const BLOCK = 65_536
/** Bytes per second at which a stream of some blocks has not ended when the next command comes. */
const SLOW = 200_000

/** A disk made by Varve with snapshots s1, s2, ..., each of which holds a block of its own. */
async function makeDisk(snapshots: number): Promise<Lab> {
  const lab = await Lab.create()
  await lab.engine.createDisk('vm', '/images/vm.qcow2', 'qcow2', 64 * BLOCK)
  for (let number = 1; number <= snapshots; number++) {
    await lab.guest('vm').write(number * BLOCK, BLOCK, Buffer.alloc(BLOCK, number), 0, 0)
    await lab.engine.createSnapshot('vm', `s${number}`)
  }
  return lab
}

function layersOf(lab: Lab): (string | undefined)[] {
  return lab.engine.showDisk('vm').layers.map(({ path, snapshot }) => snapshot?.name ?? path)
}

test('a stream ends the snapshots that it pulls up, keeps the others, and removes the files that Varve made', async () => {
  const lab = await makeDisk(4)
  const paths = lab.engine.showDisk('vm').layers.map(({ path }) => path)
  assert.deepEqual(lab.engine.planStream('vm', 's1', 's3'), ['s2'])
  await lab.engine.stream('vm', 's1', 's3')
  await lab.jobsEnd()
  assert.deepEqual(layersOf(lab), ['s1', 's3', 's4', paths[4]])
  assert.deepEqual(lab.engine.planStream('vm'), ['s1', 's3', 's4'])
  await lab.engine.stream('vm')
  await lab.jobsEnd()
  assert.deepEqual(layersOf(lab), [paths[4]])
  assert.deepEqual(await lab.host.list('/images'), ['vm.varve-4.qcow2'])
  assert.deepEqual(lab.catalog.list('garbage'), [])
  const image = await openQcow2(lab.fork().host, '/images/vm.varve-4.qcow2', { name: 'alone' })
  assert.equal(image.backingReference, undefined)
  await image.close()
  await lab.stop()
})

test('a snapshot is deleted in the direction that copies less, and the job says why', async () => {
  for (const [own, above, wanted, direction, reason] of [
    [1, 5, 'auto', 'up', '320.0 KiB to copy downward, 0 B upward'],
    [5, 1, 'auto', 'down', '64.0 KiB to copy downward, 256.0 KiB upward'],
    [2, 2, 'auto', 'up', '128.0 KiB to copy downward, 0 B upward'],
    [5, 1, 'up', 'up', 'asked for'],
    [1, 5, 'down', 'down', 'asked for'],
  ] as const) {
    const lab = await makeDisk(1)
    const { engine } = lab
    const write = (blocks: number, value: number): Promise<void> | undefined =>
      lab.guest('vm').write(0, blocks * BLOCK, Buffer.alloc(blocks * BLOCK, value), 0, 0)
    await write(own, 7)
    await engine.createSnapshot('vm', 's2')
    await write(above, 8)
    const content = await readWhole(lab.guest('vm'))
    const { id, details } = await engine.deleteSnapshot('vm', 's2', wanted)
    assert.deepEqual([details['direction'], details['reason']], [direction, reason])
    assert.equal((await engine.jobEnded(id)).error, undefined)
    assert.ok((await readWhole(lab.guest('vm'))).equals(content))
    assert.equal(layersOf(lab)[0], 's1')
    assert.equal(layersOf(lab).length, 2)
    const base = await engine.deleteSnapshot('vm', 's1')
    assert.equal(base.details['reason'], 'the image at the bottom stays')
    await lab.jobsEnd()
    assert.deepEqual(await lab.host.list('/images'), ['vm.qcow2'])
    assert.ok((await readWhole(lab.guest('vm'))).equals(content))
    await lab.stop()
  }
})

test('an image that Varve did not make stays where it is when a stream takes it out of the chain', async () => {
  const lab = await Lab.create()
  await createQcow2(lab.host, '/images/template', { size: SIZE })
  await createQcow2(lab.host, '/images/vm', { size: SIZE, backing: { name: 'template', format: 'qcow2' } })
  await lab.engine.addDisk('vm', '/images/vm', 'qcow2')
  const job = await lab.engine.stream('vm')
  const { details } = await lab.engine.jobEnded(job.id)
  assert.deepEqual(details['kept'], ['/images/template'])
  assert.deepEqual(layersOf(lab), ['/images/vm'])
  assert.notEqual(await lab.host.status('/images/template'), undefined)
  assert.deepEqual(lab.catalog.list('garbage'), [])
  // Another disk may have it now.
  await lab.engine.addDisk('other', '/images/template', 'qcow2')
  await lab.stop()
})

test('a cancelled stream leaves chain and snapshots as they were', async () => {
  const lab = await makeDisk(2)
  const before = layersOf(lab)
  const content = await readWhole(lab.guest('vm'))
  for (const [base, to] of [
    [undefined, undefined],
    [undefined, 's2'],
  ] as const) {
    const { id } = await lab.engine.stream('vm', base, to, { speed: SLOW })
    await lab.engine.sayToJob(id, 'cancel').catch(() => undefined)
    const ended = await lab.engine.jobEnded(id)
    if (ended.error === undefined) assert.fail('the stream ended before it could be cancelled')
    assert.equal(ended.error.kind, 'cancelled')
    assert.deepEqual(layersOf(lab), before)
    assert.deepEqual(
      lab.disk('vm').chain.layers.map(({ access }) => access),
      ['read', 'read', 'write'],
    )
    assert.equal(lab.disk('vm').log.bitmaps.size, 0)
  }
  await lab.guest('vm').write(0, BLOCK, Buffer.alloc(BLOCK, 9), 0, 0)
  content.fill(9, 0, BLOCK)
  assert.ok((await readWhole(lab.guest('vm'))).equals(content))
  await lab.stop()
})

test('a stream with nothing to pull up is refused, and so is any other change of the chain while one runs', async () => {
  const lab = await makeDisk(2)
  const { engine } = lab
  const refuses = (work: () => unknown, kind: 'invalid-argument' | 'busy' | 'not-found', says: RegExp): Promise<void> =>
    assert.rejects(
      async () => work(),
      (error) => isBlockError(error, kind) && says.test(error.message),
    )
  await refuses(() => engine.stream('vm', 's2', undefined), 'invalid-argument', /no layer between --base s2 and active/)
  await refuses(() => engine.stream('vm', 'active', 's1'), 'invalid-argument', /nothing to stream/)
  await refuses(() => engine.stream('vm', undefined, 'base'), 'invalid-argument', /no layer below base/)
  await refuses(() => engine.stream('vm', 'nope', undefined), 'not-found', /layers are base, s1, s2, active/)
  const { id } = await engine.stream('vm', undefined, undefined, { speed: SLOW })
  await refuses(() => engine.stream('vm'), 'busy', new RegExp(`has to wait: job ${id}`))
  await refuses(() => engine.commit('vm'), 'busy', new RegExp(id))
  await refuses(() => engine.deleteSnapshot('vm', 's1'), 'busy', new RegExp(id))
  await refuses(() => engine.createSnapshot('vm', 's3'), 'busy', new RegExp(id))
  await refuses(() => engine.removeDisk('vm'), 'busy', new RegExp(`varve job cancel ${id}`))
  // A backup reads beside it.
  const backup = await engine.backup({ disks: ['vm'], repository: LAB_REPOSITORY, full: true, speed: 0 })
  assert.equal((await engine.jobEnded(backup.id)).error, undefined)
  await engine.setJobSpeed(id, 0)
  await lab.jobsEnd()
  await lab.stop()
})

test('a stream goes on after a clean stop from what it had saved, and copies the rest', async () => {
  const lab = await Lab.create()
  await lab.engine.createDisk('vm', '/images/vm.qcow2', 'qcow2', 64 * BLOCK)
  const content = new Random(3).fill(Buffer.alloc(64 * BLOCK))
  await lab.guest('vm').write(0, content.length, content, 0, 0)
  await lab.engine.createSnapshot('vm', 's')
  const { id } = await lab.engine.stream('vm', undefined, undefined, { speed: 4 * 1024 * 1024 })
  while (lab.engine.showJob(id).done === 0) await new Promise((resolve) => setImmediate(resolve))
  const { done } = lab.engine.showJob(id)
  await lab.stop()
  await lab.start()
  await lab.engine.setJobSpeed(id, 0)
  const ended = await lab.engine.jobEnded(id)
  assert.equal(ended.error, undefined)
  assert.ok(ended.resumedAt >= done, `it had done ${done} and went on from ${ended.resumedAt}`)
  assert.equal(ended.total, 64 * BLOCK)
  assert.ok((await readWhole(lab.guest('vm'))).equals(content))
  await lab.stop()
})
