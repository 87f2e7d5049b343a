// The bitmaps that users keep, on whole engines on a simulated host: beside a model that knows what each of them has to have, through
// snapshots, merges, restarts, crashes of the process and of the host.

import assert from 'node:assert/strict'
import { type TestContext, test } from 'node:test'
import { Random, seedOfRun } from '../../src/base/random.ts'
import { type Bitmap } from '../../src/bitmap/bitmap.ts'
import { isBlockError } from '../../src/block/error.ts'
import type { Keep } from '../../src/host/simulated.ts'
import type { BitmapEdit } from '../../src/engine/bitmaps.ts'
import { Lab, readWhole } from '../support/lab.ts'

const GRANULE = 4096
const SIZE = 96 * GRANULE + 1024

/** A bitmap as it should be. */
interface Expected {
  readonly granule: number
  recording: boolean
  dirty: Set<number>
  /** The disk's content at the moment that it counts from, while it has recorded ever since; else nothing is known by content. */
  since: Buffer | undefined
}

class Trial {
  readonly random: Random
  lab: Lab
  content: Buffer = Buffer.alloc(SIZE)
  bitmaps = new Map<string, Expected>()
  #names = 0

  constructor(lab: Lab, random: Random) {
    this.lab = lab
    this.random = random
  }

  bits(name: string): Bitmap {
    const found = this.lab.disk('vm').log.bitmaps.get(name)
    assert.ok(found !== undefined && found.state === 'valid', `bitmap ${name} is there and valid`)
    return found.bits
  }

  async write(): Promise<void> {
    const { random } = this
    const sectors = SIZE / 512
    const first = random.below(sectors)
    const offset = first * 512
    const length = Math.min(1 + random.below(24), sectors - first) * 512
    const data = random.fill(Buffer.alloc(length))
    if (random.chance(0.2)) {
      data.fill(0)
      await this.lab.guest('vm').zero(offset, length, 0)
    } else await this.lab.guest('vm').write(offset, length, data, 0, 0)
    this.content.set(data, offset)
    for (const { granule, recording, dirty } of this.bitmaps.values()) {
      if (!recording) continue
      for (let g = Math.floor(offset / granule); g * granule < offset + length; g++) dirty.add(g)
    }
  }

  async edit(): Promise<void> {
    const edits = this.random.chance(0.3) ? [this.#choose(), this.#choose()] : [this.#choose()]
    await this.lab.engine.editBitmaps('vm', edits)
  }

  /** An edit that can be made, and already is in the model. */
  #choose(): BitmapEdit {
    const { random, bitmaps } = this
    const names = [...bitmaps.keys()]
    const name = random.pick(names.length === 0 ? [''] : names)
    const known = bitmaps.get(name)
    const kind =
      known === undefined
        ? 'add'
        : random.pick(['add', 'copy', 'remove', 'clear', 'enable', 'disable', 'rename', 'merge'])
    if (known === undefined || kind === 'add' || kind === 'copy') return this.#add(kind === 'copy' ? name : undefined)
    switch (kind) {
      case 'remove':
        bitmaps.delete(name)
        return { edit: 'remove', name }
      case 'clear':
        known.dirty.clear()
        known.since = known.recording ? Buffer.from(this.content) : undefined
        return { edit: 'clear', name }
      case 'enable':
      case 'disable':
        if (known.recording !== (kind === 'enable')) known.since = undefined
        known.recording = kind === 'enable'
        return { edit: kind, name }
      case 'rename': {
        const to = `b${this.#names++}`
        bitmaps.delete(name)
        bitmaps.set(to, known)
        return { edit: 'rename', name, to }
      }
      default: {
        const into = random.pick(names)
        addDirty(known, bitmaps.get(into) as Expected)
        return { edit: 'merge', name, into }
      }
    }
  }

  #add(from: string | undefined): BitmapEdit {
    const { random } = this
    const name = `b${this.#names++}`
    const source = from === undefined ? undefined : (this.bitmaps.get(from) as Expected)
    const granule = random.chance(0.5) ? (source?.granule ?? GRANULE) : GRANULE << random.below(4)
    const disabled = random.chance(0.2)
    const since = disabled ? undefined : source === undefined ? Buffer.from(this.content) : source.since
    const added: Expected = { granule, recording: !disabled, dirty: new Set(), since }
    if (source !== undefined) addDirty(source, added)
    this.bitmaps.set(name, added)
    return { edit: 'add', name, granule, ...(disabled ? { disabled } : {}), ...(from === undefined ? {} : { from }) }
  }

  checkExact(): void {
    const there = [...this.lab.disk('vm').log.bitmaps.keys()].filter((name) => !name.includes(':'))
    assert.deepEqual(there.sort(), [...this.bitmaps.keys()].sort())
    for (const [name, { granule, dirty }] of this.bitmaps) {
      const bits = this.bits(name)
      assert.equal(bits.granule, granule, name)
      const found = Array.from({ length: bits.length }, (_, g) => g).filter((g) => bits.has(g))
      assert.deepEqual(
        found,
        [...dirty].sort((a, b) => a - b),
        name,
      )
    }
  }

  /** After a power loss: no granule that differs from the bitmap's moment is missing, and what did not record is as it was. */
  async checkCovers(lab: Lab): Promise<void> {
    const now = await readWhole(lab.guest('vm'))
    for (const [name, { recording, since, dirty }] of this.bitmaps) {
      const found = lab.disk('vm').log.bitmaps.get(name)
      assert.ok(found !== undefined && found.state === 'valid', `bitmap ${name} survives`)
      const { bits } = found
      for (const g of dirty) assert.ok(bits.has(g), `${name}: granule ${g}, which was set, is set`)
      if (!recording) assert.equal(bits.count, dirty.size, `${name} does not record and is as it was`)
      for (let at = 0; since !== undefined && at < SIZE; at += 512) {
        const differs = now.compare(since, at, at + 512, at, at + 512) !== 0
        assert.ok(!differs || bits.hasAny(at, 512), `${name}: what differs at ${at} is marked`)
      }
    }
  }
}

function addDirty(from: Expected, into: Expected): void {
  for (const g of from.dirty) {
    const end = Math.min((g + 1) * from.granule, SIZE)
    for (let h = Math.floor((g * from.granule) / into.granule); h * into.granule < end; h++) into.dirty.add(h)
  }
}

async function start(t: TestContext, format: 'raw' | 'qcow2'): Promise<Trial> {
  const random = new Random(seedOfRun())
  t.diagnostic(`VARVE_SEED=${random.seed}`)
  const lab = await Lab.create()
  await lab.engine.createDisk('vm', `/images/vm.${format}`, format, SIZE)
  return new Trial(lab, random)
}

for (const format of ['raw', 'qcow2'] as const) {
  test(`bitmaps of a ${format} disk are exact through edits, snapshots, merges, restarts and deaths of the process`, async (t) => {
    const trial = await start(t, format)
    const { random } = trial
    for (let step = 0; step < 250; step++) {
      const dice = random.below(100)
      if (dice < 60) await trial.write()
      else if (dice < 90) await trial.edit()
      else if (dice < 92) await trial.lab.engine.createSnapshot('vm', `s${step}`)
      else if (dice < 94 && trial.lab.engine.listSnapshots('vm').length > 0) {
        await trial.lab.engine.deleteSnapshot('vm', trial.lab.engine.listSnapshots('vm')[0]?.name ?? '')
        await trial.lab.jobsEnd()
      } else if (dice < 97) {
        await trial.lab.stop()
        await trial.lab.start()
      } else {
        trial.lab = trial.lab.fork()
        await trial.lab.start()
      }
      trial.checkExact()
    }
    assert.ok((await readWhole(trial.lab.guest('vm'))).equals(trial.content))
    await trial.lab.stop()
  })

  test(`bitmaps of a ${format} disk cover all that differs after a power loss`, async (t) => {
    const trial = await start(t, format)
    const { random } = trial
    for (let step = 0; step < 120; step++) {
      const dice = random.below(100)
      if (dice < 60) await trial.write()
      else if (dice < 95) await trial.edit()
      else await trial.lab.guest('vm').flush()
      const after = trial.lab.fork(random.pick<Keep>(['all', 'none', random, random]))
      await after.start()
      await trial.checkCovers(after)
      await after.stop()
    }
    await trial.lab.stop()
  })
}

test('the edits of one request are made together or not at all, and each bad one says what is wrong', async () => {
  const lab = await Lab.create()
  const { engine } = lab
  await engine.createDisk('vm', '/images/vm.raw', 'raw', SIZE)
  await engine.editBitmaps('vm', [{ edit: 'add', name: 'a' }])
  const refusals: [BitmapEdit, string, RegExp][] = [
    [{ edit: 'add', name: 'a' }, 'exists', /a bitmap "a" on this disk already/],
    [{ edit: 'add', name: 'x y' }, 'invalid-argument', /use 1 to 64 letters/],
    [{ edit: 'add', name: 'job:1' }, 'invalid-argument', /Varve's own/],
    [{ edit: 'add', name: 'b', granule: 3000 }, 'invalid-argument', /power of two from 4 KiB/],
    [{ edit: 'add', name: 'b', granule: 512 }, 'invalid-argument', /power of two from 4 KiB/],
    [{ edit: 'add', name: 'b', from: 'none' }, 'not-found', /varve bitmap list vm/],
    [{ edit: 'remove', name: 'none' }, 'not-found', /no bitmap "none"/],
    [{ edit: 'clear', name: 'backup:x' }, 'invalid-argument', /Varve's own/],
    [{ edit: 'rename', name: 'a', to: 'job:x' }, 'invalid-argument', /Varve's own/],
    [{ edit: 'rename', name: 'none', to: 'c' }, 'not-found', /no bitmap "none"/],
    [{ edit: 'merge', name: 'none', into: 'a' }, 'not-found', /no bitmap "none"/],
    [{ edit: 'merge', name: 'a', into: 'job:x' }, 'invalid-argument', /Varve's own/],
  ]
  for (const [edit, kind, message] of refusals) {
    const isSo = (error: unknown): boolean => isBlockError(error) && error.kind === kind && message.test(error.message)
    await assert.rejects(engine.editBitmaps('vm', [{ edit: 'add', name: 'new' }, edit]), isSo, JSON.stringify(edit))
    assert.deepEqual(
      engine.showDisk('vm').bitmaps.map(({ name }) => name),
      ['a'],
    )
  }
  await lab.stop()
})

test('two bitmaps are compared in bytes of the disk, whatever their granules', async () => {
  const lab = await Lab.create()
  const { engine } = lab
  await engine.createDisk('vm', '/images/vm.raw', 'raw', SIZE)
  const data = Buffer.alloc(GRANULE, 1)
  await engine.editBitmaps('vm', [
    { edit: 'add', name: 'fine' },
    { edit: 'add', name: 'coarse', granule: 4 * GRANULE },
  ])
  await lab.guest('vm').write(0, GRANULE, data, 0, 0)
  await engine.editBitmaps('vm', [{ edit: 'disable', name: 'coarse' }])
  await lab.guest('vm').write(SIZE - 512, 512, data, 0, 0)
  assert.deepEqual(engine.compareBitmaps('vm', 'fine', 'coarse'), { both: 4 * GRANULE, onlyFirst: 1024, onlySecond: 0 })
  assert.deepEqual(engine.compareBitmaps('vm', 'coarse', 'fine'), { both: 4 * GRANULE, onlyFirst: 0, onlySecond: 1024 })
  assert.throws(
    () => engine.compareBitmaps('vm', 'fine', 'none'),
    (error) => isBlockError(error, 'not-found'),
  )
  await lab.stop()
})
