import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { Random } from '../../base/random.ts'
import { BlockError } from '../../block/error.ts'
import { SimulatedHost } from '../../host/simulated.ts'
import { createQcow2 } from './create.ts'
import { openQcow2, type Qcow2Image } from './image.ts'
import { MetadataCache, metadataCache, type Piece } from './metadata-cache.ts'

const KIB = 1024
const MIB = 1024 * KIB

interface Owner {
  readonly gone: number[]
  dropped(number: number): void
  clean(piece: Piece): boolean
}

function owner(clean: (piece: Piece) => boolean = () => true): Owner {
  const gone: number[] = []
  return { gone, dropped: (number) => void gone.push(number), clean }
}

/** Runs `work` with another budget for this thread's images. */
async function withBudget(bytes: number, work: () => Promise<void>): Promise<void> {
  const before = metadataCache.budget
  metadataCache.budget = bytes
  try {
    await work()
  } finally {
    metadataCache.budget = before
  }
}

suite('the metadata cache', () => {
  test('keeps its budget, drops what was used longest ago, and never what is pinned', () => {
    const mine = owner()
    const cache = new MetadataCache(4 * KIB)
    const made = [0, 1, 2, 3].map((number) => cache.add(mine, number, new Uint8Array(KIB)))
    cache.touch(made[0] as Piece)
    ;(made[1] as Piece).pins++
    cache.add(mine, 4, new Uint8Array(KIB))
    cache.add(mine, 5, new Uint8Array(KIB))
    assert.deepEqual(mine.gone, [2, 3])
    assert.equal(cache.bytes, 4 * KIB)
    cache.budget = 0
    assert.deepEqual(mine.gone, [2, 3, 0, 4, 5])
  })

  test('drops a dirty piece only when its owner has written it', () => {
    let isWritable = false
    const mine = owner(() => isWritable)
    const cache = new MetadataCache(2 * KIB)
    cache.add(mine, 0, new Uint8Array(KIB)).isDirty = true
    cache.add(mine, 1, new Uint8Array(KIB)).isDirty = true
    cache.add(mine, 2, new Uint8Array(KIB))
    assert.deepEqual([mine.gone, cache.bytes], [[], 3 * KIB])
    isWritable = true
    cache.add(mine, 3, new Uint8Array(KIB))
    assert.equal(cache.bytes, 2 * KIB)
  })

  test('counts a small piece as what it takes in memory', () => {
    const cache = new MetadataCache(MIB)
    for (let number = 0; number < 10; number++) cache.add(owner(), number, new Uint8Array(64))
    assert.equal(cache.bytes, 10 * KIB)
  })
})

const SIZE = 8 * MIB

interface Subject {
  readonly image: Qcow2Image
  readonly model: Buffer
}

async function open(host: SimulatedHost, file: string): Promise<Qcow2Image> {
  const image = await openQcow2(host, file, { name: file })
  await image.setAccess('write')
  return image
}

async function assertSound({ image, model }: Subject): Promise<void> {
  const found = Buffer.alloc(SIZE)
  await image.read(0, SIZE, found, 0)
  assert.ok(found.equals(model))
  const { corruptions, leaks, problems } = await image.check()
  assert.deepEqual([corruptions, leaks], [0, 0], problems.join('\n'))
}

/** Random writes, zeros and flushes, some in flight together. */
async function churn({ image, model }: Subject, random: Random, count: number): Promise<void> {
  for (let step = 0; step < count; step++) {
    const slot = random.below(SIZE / (16 * KIB)) * 16 * KIB
    const pieces = [0, 1, 2, 3].map((number) => (slot + number * 2 * MIB) % SIZE)
    await Promise.all(
      pieces.map((offset, number) => {
        const bytes = Buffer.alloc(3000, random.below(200) + 1)
        const isZeroed = number === 3
        bytes.copy(model, offset)
        if (!isZeroed) return image.write(offset, bytes.length, bytes, 0, 0)
        model.fill(0, offset, offset + bytes.length)
        return image.zero(offset, bytes.length, 0)
      }),
    )
    if (random.chance(0.1)) await image.flush()
  }
}

suite('many images share one budget', () => {
  for (const [name, scheduler] of [
    ['at once', undefined],
    ['late', new Random(5)],
  ] as const) {
    test(`which is far too small for them, on a host that completes ${name}`, () =>
      withBudget(16 * KIB, async () => {
        const host = new SimulatedHost(scheduler === undefined ? {} : { scheduler })
        const random = new Random(7)
        const subjects: Subject[] = []
        for (let number = 0; number < 12; number++) {
          await createQcow2(host, `/${number}`, { size: SIZE, clusterSize: number % 2 === 0 ? 512 : 4096 })
          subjects.push({ image: await open(host, `/${number}`), model: Buffer.alloc(SIZE) })
        }
        for (let round = 0; round < 3; round++) await Promise.all(subjects.map((subject) => churn(subject, random, 8)))
        assert.ok(metadataCache.bytes <= 16 * KIB + 12 * 4 * KIB, `${metadataCache.bytes} bytes`)
        for (const subject of subjects) await assertSound(subject)
        for (const [number, { image, model }] of subjects.entries()) {
          await image.close()
          const again = { image: await open(host, `/${number}`), model }
          await assertSound(again)
          await again.image.close()
        }
        assert.equal(metadataCache.bytes, 0)
      }))
  }

  test('and refcounts that cannot be written when they must make room are not lost, nor pile up', () =>
    withBudget(32 * KIB, async () => {
      const host = new SimulatedHost()
      await createQcow2(host, '/disk', { size: SIZE, clusterSize: 512 })
      const subject = { image: await open(host, '/disk'), model: Buffer.alloc(SIZE) }
      await churn(subject, new Random(1), 20)
      host.beforeOperation = ({ kind, path }) => {
        if (kind === 'write') throw new BlockError('no-space', `${path}: made to fail`, { path })
      }
      const bytes = Buffer.alloc(SIZE)
      for (let i = 0; i < 5; i++) await subject.image.read(0, SIZE, bytes, 0)
      assert.ok(bytes.equals(subject.model))
      assert.ok(metadataCache.bytes <= 64 * KIB, `${metadataCache.bytes} bytes`)
      host.beforeOperation = undefined
      await churn(subject, new Random(2), 20)
      await assertSound(subject)
      await subject.image.close()
      const again = { image: await open(host, '/disk'), model: subject.model }
      await assertSound(again)
      await again.image.close()
    }))
})
