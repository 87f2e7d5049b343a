import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { Random, seedOfRun } from '../base/random.ts'
import { FANOUT, GRANULE_BYTES, ID_BYTES, LEAF_BYTES } from './spec.ts'
import { PLAIN_VAULT } from './vault.ts'
import { checkNode, childAt, DISK_BYTES_MAX, levelsFor, OpenNode, spanOf } from './tree.ts'
import { type NodeStore, TreeBuilder, type TreeRoot } from './tree-builder.ts'

/** Nodes in a map by id; counts what was read and saved. */
class Nodes implements NodeStore {
  readonly #bytes = new Map<string, Uint8Array>()
  loads = 0
  saves = 0

  async load(ids: Uint8Array, at: number, level: number): Promise<Uint8Array> {
    const bytes = this.#bytes.get(Buffer.from(ids.subarray(at, at + ID_BYTES)).toString('hex'))
    assert.ok(bytes !== undefined, 'a node that was saved')
    checkNode(bytes, level, 'node')
    this.loads++
    return bytes
  }

  save(bytes: Uint8Array): Uint8Array {
    const id = PLAIN_VAULT.idOf(bytes)
    this.#bytes.set(Buffer.from(id).toString('hex'), bytes)
    this.saves++
    return id
  }
}

/** A chunk id that tells which chunk it is. */
function chunk(number: number): Uint8Array {
  return PLAIN_VAULT.idOf(Buffer.from(`chunk ${number}`))
}

/** What each granule shows, as text: '' for zeros, else the id and the granule in the chunk. */
async function flatten(nodes: Nodes, { root, size }: TreeRoot): Promise<string[]> {
  const granules: string[] = Array.from({ length: Math.ceil(size / GRANULE_BYTES) }, () => '')
  const visit = async (id: Uint8Array, level: number, start: number): Promise<void> => {
    const bytes = await nodes.load(id, 0, level)
    if (level === 0) {
      for (let at = 2; at < bytes.length; at += 35) {
        for (let i = 0; i < (bytes[at + 1] as number); i++) {
          const granule = start + (bytes[at] as number) + i
          const name = Buffer.from(bytes.subarray(at + 3, at + 35)).toString('hex')
          assert.ok(granule < granules.length, 'nothing is shown past the end of the disk')
          granules[granule] = `${name}+${(bytes[at + 2] as number) + i}`
        }
      }
      return
    }
    for (let i = 0; i < FANOUT; i++) {
      const at = childAt(bytes, i)
      const below = (start * GRANULE_BYTES + i * spanOf(level - 1)) / GRANULE_BYTES
      if (at >= 0) await visit(bytes.subarray(at, at + ID_BYTES), level - 1, below)
    }
  }
  if (root !== undefined) await visit(root, levelsFor(size), 0)
  return granules
}

suite('tree builder', () => {
  test('levels cover exactly the sizes that they should', () => {
    const sizes: [number, number][] = [
      [0, 0],
      [LEAF_BYTES, 0],
      [LEAF_BYTES + 1, 1],
      [16 * 2 ** 20, 1],
      [16 * 2 ** 20 + 1, 2],
      [2 ** 30, 2],
      [2 ** 40, 4],
      [DISK_BYTES_MAX, 5],
    ]
    for (const [size, level] of sizes) assert.equal(levelsFor(size), level, `${size}`)
  })

  test('random changes over many generations show the same as a plain list, for disks that grow and shrink', async (t) => {
    const random = new Random(seedOfRun())
    t.diagnostic(`VARVE_SEED=${random.seed}`)
    const nodes = new Nodes()
    let size = random.between(1, 20 * 2 ** 20)
    let model: string[] = Array.from({ length: Math.ceil(size / GRANULE_BYTES) }, () => '')
    let tree: TreeRoot | undefined
    let chunks = 0
    for (let generation = 0; generation < 40; generation++) {
      if (random.chance(0.3)) {
        size = GRANULE_BYTES * random.between(1, random.pick([60, 5000, 9000]))
        const length = Math.ceil(size / GRANULE_BYTES)
        model = Array.from({ length }, (_, i) => model[i] ?? '')
      }
      const builder = await TreeBuilder.begin(size, nodes, tree)
      for (let at = 0; at < model.length; at += random.between(1, random.pick([20, 3000]))) {
        if (random.chance(0.3)) {
          const count = Math.min(model.length - at, random.pick([1, 64, 5000]))
          await builder.clear(at * GRANULE_BYTES, count * GRANULE_BYTES)
          model.fill('', at, at + count)
          at += count
        } else {
          const count = Math.min(model.length - at, random.between(1, 16 - (at % 16)))
          const id = chunk(random.chance(0.1) ? 0 : ++chunks)
          await builder.set(at * GRANULE_BYTES, count * GRANULE_BYTES, id, 0)
          for (let i = 0; i < count; i++) model[at + i] = `${Buffer.from(id).toString('hex')}+${i}`
          at += count
        }
      }
      tree = { root: await builder.finish(), size }
      assert.deepEqual(await flatten(nodes, tree), model, `seed ${random.seed}, generation ${generation}`)
    }
  })

  test('the same content has the same root, whatever way it came about', async () => {
    const nodes = new Nodes()
    const size = 40 * 2 ** 20
    const direct = await TreeBuilder.begin(size, nodes)
    await direct.set(0, 65_536, chunk(1), 0)
    const expected = await direct.finish()
    const around = await TreeBuilder.begin(size, nodes)
    await around.set(0, 65_536, chunk(1), 0)
    await around.set(30 * 2 ** 20, 4096, chunk(2), 0)
    const detour = await TreeBuilder.begin(size, nodes, { root: await around.finish(), size })
    await detour.clear(30 * 2 ** 20, 4096)
    assert.deepEqual(await detour.finish(), expected)
    const empty = await TreeBuilder.begin(size, nodes, { root: expected, size })
    await empty.clear(0, size)
    assert.equal(await empty.finish(), undefined)
  })

  test('a change reads and saves one path, and clearing a terabyte a few nodes', async () => {
    const nodes = new Nodes()
    const size = 2 ** 41
    const first = await TreeBuilder.begin(size, nodes)
    for (let at = 0; at < size; at += 2 ** 33) await first.set(at, 65_536, chunk(at), 0)
    const parent = { root: await first.finish(), size }
    nodes.loads = 0
    nodes.saves = 0
    const second = await TreeBuilder.begin(size, nodes, parent)
    await second.set(2 ** 40 + 2 ** 33, 4096, chunk(1), 0)
    await second.finish()
    assert.deepEqual([nodes.loads, nodes.saves], [5, 5])
    nodes.loads = 0
    const third = await TreeBuilder.begin(size, nodes, parent)
    await third.clear(4096, size - 8192)
    await third.finish()
    assert.ok(nodes.loads <= 10, `${nodes.loads}`)
  })
})

suite('tree nodes', () => {
  test('a node that is not well-formed is refused', () => {
    const leaf = new OpenNode(0)
    leaf.set(3, 4, chunk(1), 0)
    leaf.set(9, 1, chunk(2), 0)
    const good = leaf.encode() as Uint8Array
    checkNode(good, 0, 'node')
    const changed = (at: number, value: number): Uint8Array => good.with(at, value)
    const bad = [
      new Uint8Array(0),
      good.subarray(0, good.length - 1),
      changed(0, 0x4e),
      changed(1, 0),
      changed(1, 3),
      changed(2, 7), // overlaps the next segment
      changed(3, 0), // no granules
      changed(3, 17), // more than a chunk has
      changed(4, 13), // past the end of the chunk
      changed(2 + 35, 64), // past the end of the leaf
    ]
    for (const [i, bytes] of bad.entries())
      assert.throws(() => checkNode(bytes, 0, 'node'), /no node of level 0/, `${i}`)
    const node = new OpenNode(2)
    node.set(63, 1, chunk(1), 0)
    const inner = node.encode() as Uint8Array
    checkNode(inner, 2, 'node')
    assert.throws(() => checkNode(inner, 1, 'node'), /no node of level 1/)
    assert.throws(() => checkNode(inner.with(2, 0x80), 2, 'node'), /no node/)
    assert.throws(() => checkNode(inner.subarray(0, 10), 2, 'node'), /no node/)
  })
})
