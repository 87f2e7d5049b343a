import assert from 'node:assert/strict'
import { test } from 'node:test'
import { Random, seedOfRun } from '../base/random.ts'
import { SCRATCH_SLAB } from '../base/limits.ts'
import { BlockError, isBlockError } from '../block/error.ts'
import type { HostFile } from '../host/host.ts'
import { SimulatedHost } from '../host/simulated.ts'
import { ScratchBudget } from './scratch-budget.ts'
import { ScratchMemory } from './scratch-memory.ts'
import { Scratch } from './scratch.ts'

const GRANULE = 4096
const IN_SLAB = SCRATCH_SLAB / GRANULE

interface Trial {
  readonly scratch: Scratch
  readonly file: HostFile
  readonly memory: ScratchBudget
  readonly budget: ScratchBudget
}

async function begin(slabs: number, scheduler?: Random): Promise<Trial> {
  const host = new SimulatedHost(scheduler === undefined ? {} : { scheduler })
  const file = await host.open('/scratch', { write: true, create: 'exclusive' })
  const memory = ScratchBudget.of(slabs * SCRATCH_SLAB, 1)
  const budget = ScratchBudget.of(1024 * GRANULE, 1)
  return {
    scratch: new Scratch({ memory: new ScratchMemory(GRANULE, memory), file }, GRANULE, [budget]),
    file,
    memory,
    budget,
  }
}

function contentOf(index: number): Uint8Array {
  return new Random(index + 1).fill(Buffer.alloc(GRANULE))
}

async function save(scratch: Scratch, first: number, end: number): Promise<void> {
  for (let index = first; index < end; index++) await scratch.save(index, contentOf(index), 0, GRANULE)
}

async function shows(scratch: Scratch, index: number, why: string): Promise<void> {
  const bytes = Buffer.alloc(GRANULE)
  await scratch.read(index, 0, 1000, bytes, 0)
  await scratch.read(index, 1000, GRANULE - 1000, bytes, 1000)
  assert.ok(bytes.equals(contentOf(index)), `${why}: granule ${index}`)
}

/** What goes to the file is there. */
async function settle(): Promise<void> {
  for (let turn = 0; turn < 20; turn++) await new Promise((resolve) => setImmediate(resolve))
}

test('what fits into memory never touches the file', async () => {
  const { scratch, file, memory, budget } = await begin(4)
  await save(scratch, 0, 3 * IN_SLAB)
  await settle()
  assert.equal(file.size(), 0)
  for (let index = 0; index < 3 * IN_SLAB; index++) await shows(scratch, index, 'in memory')
  assert.equal(budget.used, 3 * IN_SLAB * GRANULE)
  scratch.free(0, 3 * IN_SLAB)
  assert.equal(budget.used, 0)
  await save(scratch, 500, 500 + IN_SLAB)
  assert.equal(file.size(), 0)
  await scratch.close()
  assert.deepEqual([memory.used, budget.used], [0, 0])
})

test('when memory is scarce what it has goes to the file in order and large pieces, and later saves find room there', async () => {
  const { scratch, file, memory } = await begin(2)
  const writes: [number, number][] = []
  const write = file.write.bind(file)
  file.write = (offset, length, from, at) => {
    writes.push([offset, length])
    return write(offset, length, from, at)
  }
  for (let index = 0; index < 6 * IN_SLAB; index++) {
    await save(scratch, index, index + 1)
    if (index % 8 === 7) await settle()
  }
  assert.ok(writes.length > 2)
  for (const [number, [offset, length]] of writes.entries())
    assert.deepEqual([offset, length], [number * SCRATCH_SLAB, SCRATCH_SLAB])
  assert.equal(memory.used, 2 * SCRATCH_SLAB)
  for (let index = 0; index < 6 * IN_SLAB; index++) await shows(scratch, index, 'half of it in the file')
  await scratch.close()
  assert.equal(memory.used, 0)
})

test('where there is no memory at all each save is a write of the file', async () => {
  const { scratch, file, budget } = await begin(0)
  await save(scratch, 0, 10)
  assert.equal(file.size(), 10 * GRANULE)
  scratch.free(2, 5)
  await save(scratch, 20, 23)
  assert.equal(file.size(), 10 * GRANULE, 'slots that are free are used again')
  for (const index of [0, 1, 5, 9, 20, 21, 22]) await shows(scratch, index, 'in the file')
  assert.equal(budget.used, 10 * GRANULE)
  await scratch.close()
})

test('memory that another one gives back is taken', async () => {
  const { scratch, file, memory } = await begin(1)
  memory.take(SCRATCH_SLAB)
  await save(scratch, 0, 2)
  assert.equal(file.size(), 2 * GRANULE)
  memory.give(SCRATCH_SLAB)
  await save(scratch, 2, 6)
  assert.equal(file.size(), 2 * GRANULE)
  await scratch.close()
})

test('a file that cannot be written loses nothing of what memory has, and fails the save for which there is no room', async () => {
  const { scratch, file } = await begin(1)
  const trouble = new BlockError('io', 'the disk is broken')
  file.write = () => Promise.reject(trouble)
  await save(scratch, 0, IN_SLAB)
  await settle()
  await assert.rejects(save(scratch, IN_SLAB, IN_SLAB + 1), (error) => isBlockError(error, 'io'))
  for (let index = 0; index < IN_SLAB; index++) await shows(scratch, index, 'still in memory')
  await scratch.close()
})

test('saves, reads and frees in any order while memory goes to the file', async (t) => {
  const random = new Random(seedOfRun())
  t.diagnostic(`VARVE_SEED=${random.seed}`)
  for (let round = 0; round < 10; round++) {
    const { scratch, memory, budget } = await begin(1 + random.below(3), new Random(random.seed + round))
    const saved = new Set<number>()
    const done = new Set<number>()
    for (let step = 0; step < 2000; step++) {
      const index = random.below(800)
      const why = `VARVE_SEED=${random.seed}, round ${round}, step ${step}`
      if (saved.has(index)) {
        if (random.below(3) > 0) {
          await shows(scratch, index, why)
          continue
        }
        scratch.free(index, index + 1)
        saved.delete(index)
        done.add(index)
      } else if (!done.has(index)) {
        await save(scratch, index, index + 1)
        saved.add(index)
      }
      assert.equal(budget.used, saved.size * GRANULE, why)
    }
    for (const index of saved) await shows(scratch, index, `VARVE_SEED=${random.seed}, the end of round ${round}`)
    await scratch.close()
    assert.deepEqual([memory.used, budget.used], [0, 0])
  }
})
