// Parts of backups: what a writer keeps of itself before its end, for another backup to have as its parent.

import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { backUp, beginFull, failsWith, initInline, noise, openInline, restore } from '../../test/support/backups.ts'
import { Random } from '../base/random.ts'
import { MemoryStore } from './stores/memory.ts'

const MIB = 1024 * 1024
const SIZE = 3 * MIB
const DISKS = [{ name: 'sda', size: SIZE }]

suite('parts', () => {
  test('a part shows what was written before it, is listed nowhere, and a backup that has it for its parent stores the rest', async () => {
    const store = new MemoryStore('memory')
    const repository = await initInline(store)
    const content = noise(new Random(1), SIZE)
    const writer = await beginFull(repository, DISKS)
    await writer.disk(0).write(0, MIB, content, 0)
    const first = await writer.keepPart()
    await writer.disk(0).write(MIB, MIB, content, MIB)
    const second = await writer.keepPart()
    const shown = Buffer.alloc(SIZE)
    content.copy(shown, 0, 0, MIB)
    assert.ok((await restore(repository, first.id)).equals(shown))
    content.copy(shown, MIB, MIB, 2 * MIB)
    assert.ok((await restore(repository, second.id)).equals(shown))
    await writer.abort()
    assert.deepEqual(await repository.backups(), [])
    assert.deepEqual((await repository.parts()).map(({ id }) => id).sort(), [first.id, second.id].sort())
    assert.equal((await repository.stats()).backups, 0)

    const parent = { backup: second.id, disk: 'sda' }
    const later = await repository.begin({
      machine: 'vm1',
      moment: 2000,
      kind: 'full',
      disks: [{ name: 'sda', size: SIZE, parent }],
    })
    await later.disk(0).write(2 * MIB, MIB, content, 2 * MIB)
    const whole = await later.finish()
    assert.ok((await restore(repository, whole.id)).equals(content))
    assert.ok(whole.storedBytes < 1.1 * MIB, `stored ${whole.storedBytes}`)
    // Its parts are of no use now, and go.
    await repository.prune()
    assert.deepEqual(await repository.parts(), [])
    assert.ok((await repository.check({})).isGood)
    assert.ok((await restore(repository, whole.id)).equals(content))
  })

  test('a writer that keeps parts ends with the same backup as one that does not', async () => {
    const repository = await initInline(new MemoryStore('memory'))
    const content = noise(new Random(2), SIZE)
    const parent = await backUp(repository, content)
    const random = new Random(3)
    const disks = [{ name: 'sda', size: SIZE, parent: { backup: parent.id, disk: 'sda' } }]
    const writer = await repository.begin({ machine: 'vm1', moment: 3000, kind: 'incremental', disks })
    for (let at = 0; at < SIZE; at += 256 * 1024) {
      random.fill(content.subarray(at, at + 8192))
      content.fill(0, at + 8192, at + 16_384)
      await writer.disk(0).write(at, 8192, content, at)
      await writer.disk(0).zero(at + 8192, 8192)
      if (random.chance(0.5)) await writer.keepPart()
    }
    const info = await writer.finish()
    assert.ok((await restore(repository, info.id)).equals(content))
    assert.deepEqual(info.disks[0]?.parent, { backup: parent.id, disk: 'sda' })
  })

  test('a part of a backup that a pruning gave up is none, and the pruning goes on', async () => {
    let nowMs = 1000
    const store = new MemoryStore('memory', () => nowMs)
    const repository = await initInline(store)
    const content = noise(new Random(4), SIZE)
    const old = await backUp(repository, content)
    // Relies on what the old one has, hangs meanwhile, and wakes.
    const writer = await beginFull(repository, DISKS)
    await writer.disk(0).write(0, MIB, content, 0)
    const pruner = await openInline(store)
    await pruner.forget(old.id)
    nowMs += 3_600_000
    assert.equal((await pruner.prune()).fenced.length, 1)
    await pruner.prune()
    await failsWith('timeout', () => writer.keepPart(), /silent for so long/)
    await writer.abort()
    assert.deepEqual(await pruner.parts(), [])
    await pruner.prune()
    assert.ok((await pruner.check({})).isGood)
  })
})
