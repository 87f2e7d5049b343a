// Snapshots of several disks at one moment, on whole engines on a simulated host: what a guest wrote to one before it wrote to the
// other is in the one if it is in the other; of all disks or of none, whatever fails and wherever a crash comes.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { getUint32, setUint32 } from '../../src/base/bytes.ts'
import { Random } from '../../src/base/random.ts'
import { isBlockError } from '../../src/block/error.ts'
import { Lab, readWhole } from '../support/lab.ts'

const SIZE = 1024 * 1024
const DISKS = ['a', 'b', 'c'] as const

async function makeDisks(scheduler?: Random): Promise<Lab> {
  const lab = await Lab.create(scheduler)
  for (const disk of DISKS) await lab.engine.createDisk(disk, `/images/${disk}.qcow2`, 'qcow2', SIZE)
  return lab
}

/** Writes a growing number to each disk in turn, until told to stop. */
function writeInTurn(lab: Lab): { stop(): Promise<void> } {
  let goesOn = true
  const work = async (): Promise<void> => {
    const block = Buffer.alloc(4096)
    for (let number = 1; goesOn; number++) {
      setUint32(block, 0, number)
      for (const disk of DISKS) await lab.guest(disk).write(0, block.length, block, 0, 0)
      await new Promise((resolve) => setImmediate(resolve))
    }
  }
  const done = work()
  return {
    stop: () => {
      goesOn = false
      return done
    },
  }
}

test('a snapshot of several disks shows them at one moment', async () => {
  for (let seed = 0; seed < 10; seed++) {
    const lab = await makeDisks(new Random(seed))
    const guest = writeInTurn(lab)
    for (const name of ['one', 'two']) {
      const made = await lab.engine.createSnapshots(DISKS.toReversed(), name)
      assert.deepEqual(
        made.map(({ disk }) => disk),
        DISKS.toReversed(),
      )
    }
    await guest.stop()
    for (const name of ['one', 'two']) {
      const numbers: number[] = []
      for (const disk of DISKS) {
        await lab.engine.revert(disk, name)
        numbers.push(getUint32(await readWhole(lab.guest(disk)), 0))
      }
      const [a, b, c] = numbers as [number, number, number]
      assert.ok(a >= b && b >= c && c >= a - 1, `${name}: ${numbers.join(', ')}`)
    }
    await lab.stop()
  }
})

test('two of them at once, in other orders, each have their moment', async () => {
  const lab = await makeDisks(new Random(3))
  await Promise.all([
    lab.engine.createSnapshots(['a', 'b', 'c'], 'one'),
    lab.engine.createSnapshots(['c', 'b', 'a'], 'two'),
    lab.engine.createSnapshot('b', 'three'),
  ])
  for (const disk of DISKS) assert.equal(lab.engine.listSnapshots(disk).length, disk === 'b' ? 3 : 2)
  await lab.stop()
})

test('what one disk cannot, none does: a name in use, a job, a disk twice, a failing catalog', async () => {
  const lab = await makeDisks()
  const { engine } = lab
  const before = async (): Promise<unknown> => [
    engine.listDisks().map(({ layers }) => layers),
    await lab.host.list('/images'),
    lab.catalog.list('garbage'),
  ]
  const refuses = async (disks: readonly string[], kind: string, says: RegExp): Promise<void> => {
    const then = await before()
    await assert.rejects(engine.createSnapshots(disks, 'one'), (error) => {
      assert.ok(isBlockError(error))
      assert.equal(error.kind, kind)
      assert.match(error.message, says)
      return true
    })
    assert.deepEqual(await before(), then)
    // Nobody is held, and nothing is in the way of the next one.
    for (const disk of DISKS) await lab.guest(disk).write(0, 512, Buffer.alloc(512, 3), 0, 0)
  }
  await refuses(['a', 'b', 'nope'], 'not-found', /no disk nope/)
  await refuses(['a', 'b', 'a'], 'invalid-argument', /disk a is named twice/)
  await engine.createSnapshot('c', 'one')
  await refuses(['a', 'b', 'c'], 'exists', /disk c has a snapshot one already/)
  await lab.guest('c').write(0, SIZE, Buffer.alloc(SIZE, 1), 0, 0)
  const { id } = await engine.commit('c', undefined, undefined, { speed: 50_000 })
  await refuses(['a', 'b', 'c'], 'busy', new RegExp(id))
  await engine.setJobSpeed(id, 0)
  await lab.jobsEnd()
  lab.catalog.beforeCommit = (changes) => {
    if (changes.length > 2) throw new Error('the catalog is full')
  }
  await assert.rejects(engine.createSnapshots(['a', 'b'], 'one'), /the catalog is full/)
  lab.catalog.beforeCommit = undefined
  const made = await engine.createSnapshots(['a', 'b', 'c'], 'one')
  assert.equal(made.length, 3)
  await lab.stop()
})

test('a crash while it is taken leaves it of all disks or of none, and every acknowledged write', async () => {
  const lab = await makeDisks()
  for (const disk of DISKS) {
    await lab.guest(disk).write(0, SIZE, new Random(1).fill(Buffer.alloc(SIZE)), 0, 0)
    await lab.guest(disk).flush()
  }
  const content = await readWhole(lab.guest('a'))
  const keeps = new Random(7)
  const forks: Lab[] = []
  lab.host.beforeOperation = () => forks.push(lab.fork(), lab.fork(keeps))
  await lab.engine.createSnapshots(DISKS, 'one')
  lab.host.beforeOperation = undefined
  forks.push(lab.fork())
  await lab.stop()
  let taken = 0
  for (const fork of forks) {
    await fork.start()
    const counts = DISKS.map((disk) => fork.engine.listSnapshots(disk).length)
    assert.ok(new Set(counts).size === 1, counts.join(', '))
    taken += counts[0] as number
    for (const disk of DISKS) assert.ok((await readWhole(fork.guest(disk))).equals(content))
    assert.deepEqual(fork.catalog.list('garbage'), [])
    assert.equal((await fork.host.list('/images')).length, 3 + 3 * (counts[0] as number))
    await fork.stop()
  }
  assert.ok(taken > 0 && taken < forks.length, `${taken} of ${forks.length}`)
})
