// A repository in a folder whose host loses power, or whose process is killed, before any one operation: what was finished
// is whole, what was not is invisible or whole, and the next backup succeeds.

import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { Random, seedOfRun } from '../../src/base/random.ts'
import { isBlockError } from '../../src/block/error.ts'
import { type Keep, SimulatedHost } from '../../src/host/simulated.ts'
import { DirectoryStore } from '../../src/repository/stores/directory.ts'
import { backUp, initInline, openInline, restore } from '../support/backups.ts'

const KIB = 1024
const MIB = 1024 * KIB
const FOLDER = '/srv/backups/repository'

const storeOn = (host: SimulatedHost): DirectoryStore => new DirectoryStore(host, FOLDER)

function sample(seed: number, length: number): Buffer {
  const bytes = Buffer.alloc(length)
  new Random(seed).fill(bytes)
  return bytes
}

/**
 * Runs `work` on a copy of `host` that dies before its `dieAt`th operation. Returns what is left after it, or undefined when `work`
 * ended before.
 */
async function dying(
  host: SimulatedHost,
  dieAt: number,
  keep: Keep | 'killed',
  work: (host: SimulatedHost) => Promise<void>,
): Promise<SimulatedHost | undefined> {
  const doomed = host.clone()
  const last = host.operations + dieAt
  let left: SimulatedHost | undefined
  doomed.beforeOperation = ({ number }) => {
    // The dead do nothing more: what the process would still try after its death must not reach what is left.
    if (number >= last) {
      left ??= doomed.clone()
      throw new Error('dead')
    }
  }
  await work(doomed).catch(() => undefined)
  if (keep !== 'killed') left?.crash(keep)
  return left
}

function ways(random: Random): (Keep | 'killed')[] {
  return ['killed', 'none', 'all', random, random]
}

suite('repository on a host that crashes', () => {
  test('while it is made: afterwards it is there, or it can be made', async (t) => {
    const random = new Random(seedOfRun())
    t.diagnostic(`VARVE_SEED=${random.seed}`)
    for (const way of ways(random)) {
      let dieAt = 1
      for (; ; dieAt++) {
        let id: string | undefined
        const left = await dying(new SimulatedHost(), dieAt, way, async (host) => {
          id = (await initInline(storeOn(host))).id
        })
        if (left === undefined) break
        const opened = await openInline(storeOn(left)).catch((error: unknown) => error)
        if (opened instanceof Error) {
          assert.ok(isBlockError(opened, 'not-found') && id === undefined, String(opened))
          await initInline(storeOn(left))
        } else assert.ok(id === undefined || (opened as { id: string }).id === id)
        const again = await openInline(storeOn(left))
        const content = sample(1, 10_000)
        assert.ok((await restore(again, (await backUp(again, content)).id)).equals(content))
      }
      assert.ok(dieAt > 8, 'the sweep met the operations of making a repository')
    }
  })

  test('during backups: what was finished verifies and restores, and nothing half done is visible', async (t) => {
    const random = new Random(seedOfRun())
    t.diagnostic(`VARVE_SEED=${random.seed}`)
    const host = new SimulatedHost()
    const contents = [sample(1, 300 * KIB), sample(1, 300 * KIB), sample(2, 100 * KIB)] as [Buffer, Buffer, Buffer]
    sample(3, 20_480).copy(contents[1], 8192)
    const first = await backUp(await initInline(storeOn(host)), contents[0], undefined, 0)
    const changes = [{ offset: 8192, length: 20_480 }]
    for (const way of ways(random)) {
      let dieAt = 1
      for (; ; dieAt++) {
        const note = `seed ${random.seed}, operation ${dieAt}, ${typeof way === 'string' ? way : 'some kept'}`
        const finished = [first.id]
        const left = await dying(host, dieAt, way, async (doomed) => {
          const repository = await openInline(storeOn(doomed))
          finished.push((await backUp(repository, contents[1], { id: first.id, changes }, 1)).id)
          finished.push((await backUp(repository, contents[2], undefined, 2)).id)
        })
        if (left === undefined) break
        const repository = await openInline(storeOn(left))
        const { backups, damaged } = await repository.list()
        assert.deepEqual(damaged, [], note)
        for (const id of finished)
          assert.ok(
            backups.some((backup) => backup.id === id),
            `${note}: ${id} is gone`,
          )
        for (const { id, moment } of backups) {
          assert.ok((await repository.verify(id)).isGood, note)
          assert.ok((await restore(repository, id)).equals(contents[moment] as Buffer), note)
        }
        const next = await backUp(repository, contents[1], { id: first.id, changes }, 1)
        assert.ok((await restore(await openInline(storeOn(left)), next.id)).equals(contents[1]), note)
      }
      assert.ok(dieAt > 40, 'the sweep met the operations of two backups')
    }
  })

  test('during a backup of several packs: the packs that were durable are used again', async (t) => {
    const random = new Random(seedOfRun())
    t.diagnostic(`VARVE_SEED=${random.seed}`)
    const host = new SimulatedHost({ scheduler: random })
    await initInline(storeOn(host))
    const content = sample(4, 35 * MIB)
    let reused = 0
    for (let dieAt = 10; ; dieAt += 9) {
      let finished: string | undefined
      const left = await dying(host, dieAt, random, async (doomed) => {
        finished = (await backUp(await openInline(storeOn(doomed)), content)).id
      })
      if (left === undefined) break
      const repository = await openInline(storeOn(left))
      const visible = (await repository.backups()).map(({ id }) => id)
      assert.deepEqual(visible, finished === undefined ? visible.slice(0, 1) : [finished])
      let durable = 0
      for (const name of await left.list(`${FOLDER}/packs`)) {
        if (!name.endsWith('.part')) durable += (await left.status(`${FOLDER}/packs/${name}`))?.size ?? 0
      }
      const again = await backUp(repository, content)
      assert.ok(again.storedBytes < content.length + 100 * KIB - durable, `seed ${random.seed}, operation ${dieAt}`)
      if (durable > 0) reused++
      assert.ok((await repository.verify(again.id)).isGood)
      assert.ok((await restore(repository, again.id)).equals(content))
    }
    assert.ok(reused > 0, 'some crash came after a pack was durable')
  })

  test('during a pruning that forgets, rewrites and removes: what stays is whole, and the next one ends it', async (t) => {
    const random = new Random(seedOfRun())
    t.diagnostic(`VARVE_SEED=${random.seed}`)
    const host = new SimulatedHost()
    const shared = sample(5, 60 * KIB)
    const contents = [6, 7, 8].map((seed) => Buffer.concat([shared, sample(seed, 30 * KIB)])) as [
      Buffer,
      Buffer,
      Buffer,
    ]
    const repository = await initInline(storeOn(host))
    const ids: string[] = []
    for (const [moment, content] of contents.entries())
      ids.push((await backUp(repository, content, undefined, moment)).id)
    await repository.forget(ids[0] as string)
    for (const way of ways(random)) {
      let dieAt = 1
      for (; ; dieAt += 2) {
        const note = `seed ${random.seed}, operation ${dieAt}, ${typeof way === 'string' ? way : 'some kept'}`
        const left = await dying(host, dieAt, way, async (doomed) => {
          await (await openInline(storeOn(doomed))).prune({ keep: { last: 1 }, repackBelow: 1 })
        })
        if (left === undefined) break
        const after = await openInline(storeOn(left))
        const list = await after.list()
        assert.deepEqual(list.damaged, [], note)
        assert.ok(
          list.backups.some(({ id }) => id === ids[2]),
          `${note}: the newest is gone`,
        )
        for (const { id, moment } of list.backups) {
          assert.ok((await restore(after, id)).equals(contents[moment] as Buffer), `${note}: ${id}`)
        }
        await after.prune({ keep: { last: 1 }, repackBelow: 1, leaseMs: 0 })
        await after.prune({ leaseMs: 0 })
        const store = storeOn(left)
        for (const prefix of ['sessions/', 'marks/', 'forgotten/']) assert.deepEqual(await store.list(prefix), [], note)
        assert.equal((await store.list('packs/')).length, 1, note)
        assert.ok((await after.check({ reads: () => true })).isGood, note)
        assert.ok((await restore(after, ids[2] as string)).equals(contents[2]), note)
      }
      assert.ok(dieAt > 40, 'the sweep met the operations of a pruning')
    }
  })
})
