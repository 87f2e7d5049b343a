// A disk that shrinks, grows or is preallocated while its host dies, at every operation: it has the old size or the new one,
// what both sizes have in common is there, and what was cut off never shows again.

import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { Random } from '../../src/base/random.ts'
import { BlockError, isBlockError } from '../../src/block/error.ts'
import { type CreateOptions, createQcow2 } from '../../src/format/qcow2/create.ts'
import { openQcow2, type Qcow2Image } from '../../src/format/qcow2/image.ts'
import type { ResizeOptions } from '../../src/format/qcow2/resize.ts'
import { SimulatedHost } from '../../src/host/simulated.ts'

const KIB = 1024
const SIZE = 300 * KIB

const SHAPES: readonly (readonly [name: string, options: Partial<CreateOptions>])[] = [
  ['clusters of 512', { clusterSize: 512 }],
  ['clusters of 4 KiB', { clusterSize: 4 * KIB }],
  ['version 2', { clusterSize: 512, version: 2 }],
  ['a data file', { clusterSize: 512, dataFile: 'data' }],
]

const CHANGES: readonly (readonly [name: string, size: number, options: ResizeOptions])[] = [
  ['shrinks', 41 * KIB, { shrink: true }],
  ['shrinks to nothing', 0, { shrink: true }],
  ['grows', 900 * KIB, {}],
  ['grows with places for all', 900 * KIB, { preallocation: 'metadata' }],
]

async function open(host: SimulatedHost): Promise<Qcow2Image> {
  const image = await openQcow2(host, '/disk', { name: 'disk' })
  await image.setAccess('write')
  return image
}

async function contentOf(image: Qcow2Image): Promise<Buffer> {
  const bytes = Buffer.alloc(image.size)
  await image.read(0, bytes.length, bytes, 0)
  return bytes
}

/** Opens what a crash left, and fails where it is not what it must be. */
async function examine(host: SimulatedHost, noise: Buffer, size: number, isVersion2: boolean): Promise<void> {
  const image = await open(host)
  assert.ok(image.size === SIZE || image.size === size, `it has ${image.size} bytes`)
  const common = Math.min(SIZE, size)
  const found = await contentOf(image)
  assert.ok(found.subarray(0, common).equals(noise.subarray(0, common)), 'what both sizes have is there')
  if (size > SIZE) assert.ok(found.subarray(SIZE).equals(Buffer.alloc(found.length - SIZE)), 'what is new is zeros')
  const before = await image.check()
  assert.equal(before.corruptions, 0, before.problems.join('\n'))
  if (!isVersion2) assert.equal(before.leaks, 0, before.problems.join('\n'))
  await image.resize(size, { shrink: true })
  const larger = Math.max(SIZE, size) + 100 * KIB
  await image.resize(larger)
  const expected = Buffer.alloc(larger)
  noise.copy(expected, 0, 0, common)
  assert.ok((await contentOf(image)).equals(expected), 'what was cut off does not come back')
  await image.close()
  const closed = await openQcow2(host, '/disk', { name: 'disk' })
  const after = await closed.check()
  assert.deepEqual([after.corruptions, after.leaks], [0, before.leaks], after.problems.join('\n'))
  await closed.close()
}

suite('a qcow2 disk outlives a crash while it', () => {
  for (const [shape, create] of SHAPES) {
    for (const [name, size, options] of CHANGES) {
      test(`${name}: ${shape}`, async () => {
        const noise: Buffer = Buffer.alloc(SIZE)
        new Random(1).fill(noise)
        const origin = new SimulatedHost()
        await createQcow2(origin, '/disk', { size: SIZE, ...create })
        const made = await open(origin)
        await made.write(0, SIZE, noise, 0, 0)
        await made.close()
        await origin.syncFolder('/')
        let isDone = false
        for (let number = 1; !isDone; number++) {
          const host = origin.clone({})
          const image = await open(host)
          const random = new Random(number)
          const last = host.operations + number
          host.beforeOperation = (operation) => {
            if (operation.number === last) host.crash(number % 5 === 0 ? 'none' : random)
          }
          try {
            await image.resize(size, options)
            isDone = true
            host.beforeOperation = undefined
            host.crash('none')
            const resized = await openQcow2(host, '/disk', { name: 'disk' })
            assert.equal(resized.size, size, 'what returned is durable')
            await resized.close()
          } catch (error) {
            if (!isBlockError(error, 'closed')) throw error
          }
          host.beforeOperation = undefined
          try {
            await examine(host, noise, size, create.version === 2)
          } catch (error) {
            throw new Error(`crash at operation ${number}: ${String(error)}`, { cause: error })
          }
        }
      })
    }
  }
})

test('an image that cannot be made whole is not there', async () => {
  let isDone = false
  for (let number = 1; !isDone; number++) {
    const host = new SimulatedHost()
    host.beforeOperation = (operation) => {
      const { kind, path } = operation
      if (operation.number === number && kind !== 'unlink')
        throw new BlockError('no-space', `${path}: made to fail`, { path })
    }
    const options = { size: SIZE, clusterSize: 512, dataFile: 'data', preallocation: 'full' } as const
    try {
      await createQcow2(host, '/disk', options)
      isDone = true
    } catch (error) {
      assert.ok(error instanceof BlockError, String(error))
      assert.deepEqual(await host.list('/'), [], `operation ${number}`)
    }
  }
})
