// A migration between two engines on simulated hosts, struck at durable writes of either, from its first to its last: the source dies, the
// target dies, both die, or the line between them is cut, by a kill or by a power loss. Never do both have the authority over the
// disk; in the end one has it, with every write that was acknowledged, the snapshot as it was, and a bitmap that misses nothing.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { Random, seedOfRun } from '../../src/base/random.ts'
import { isBlockError } from '../../src/block/error.ts'
import { createQcow2 } from '../../src/format/qcow2/create.ts'
import { Lab, readWhole } from '../support/lab.ts'
import { LabWire } from '../support/lab-wire.ts'
import { checkStamps, STAMPED_PIECE, StampingGuest } from '../support/stamping-guest.ts'

const CLUSTER = 65_536
const SIZE = 16 * CLUSTER
const PIECES = SIZE / STAMPED_PIECE
const BITMAP = 'since-monday'
/** Strikes of each kind; with VARVE_ROUNDS more. */
const ROUNDS = Number(process.env['VARVE_ROUNDS'] ?? 6)
const PATIENCE_MS = 300_000

const STRIKES = ['source dies', 'target dies', 'both die', 'line is cut'] as const
type Strike = (typeof STRIKES)[number]
const SIDES = ['source', 'target'] as const
type Side = (typeof SIDES)[number]

/** One migration, and what is left of it. */
class World {
  source: Lab
  target: Lab
  wire: LabWire
  readonly guest = new StampingGuest(SIZE)
  readonly #random: Random
  /** What may be read at least: set by a strike that takes unflushed writes, or the guest's later ones. */
  #oldest: Uint8Array | undefined
  #snapshot: Buffer = Buffer.alloc(0)
  /** What each piece was stamped with when the bitmap began. */
  #before: Uint8Array = new Uint8Array(0)
  /** Durable writes of both sides so far, and since the target had all of the disk. */
  operations = 0
  sinceSeal = 0
  #isStruck = false
  #lost: Side | undefined
  /** Called at each of them. */
  onOperation: (() => void) | undefined

  private constructor(source: Lab, target: Lab, random: Random) {
    this.source = source
    this.target = target
    this.wire = new LabWire(target)
    this.#random = random
    source.peers = this.wire
  }

  static async make(seed: number): Promise<World> {
    const random = new Random(seed)
    const late = (): Random | undefined => (random.chance(0.5) ? new Random(random.next()) : undefined)
    const world = new World(await Lab.create(late()), await Lab.create(late()), random)
    const { source, guest } = world
    await createQcow2(source.host, '/images/base', { size: SIZE })
    await source.engine.addDisk('vm', '/images/base', 'qcow2')
    await world.write(30)
    world.#snapshot = await readWhole(source.guest('vm'))
    await source.engine.createSnapshot('vm', 'monday')
    await source.disk('vm').log.edit([{ kind: 'add', name: BITMAP, recording: true, fill: 'none' }])
    world.#before = guest.acknowledged.slice()
    await world.write(30)
    await guest.flush(source.guest('vm'))
    return world
  }

  async write(count: number): Promise<void> {
    for (let i = 0; i < count && !this.#isStruck; i++) {
      await this.guest.write(this.source.guest('vm'), this.#random.below(PIECES))
      if (i % 7 === 6) await this.guest.flush(this.source.guest('vm'))
    }
  }

  /** Counts every operation of the hosts and every commit from here on. */
  count(): void {
    const tick = (): void => {
      this.operations++
      const record = this.target.catalog.list('disk')[0]
      if (record?.incoming?.sealed === true || record?.arrival !== undefined) this.sinceSeal++
      if (!this.#isStruck) this.onOperation?.()
    }
    for (const lab of [this.source, this.target]) {
      lab.host.beforeOperation = tick
      lab.catalog.beforeCommit = tick
    }
  }

  async begin(): Promise<void> {
    const { id } = await this.source.engine.migrate('vm', {
      target: 'lab:target',
      mode: this.#random.pick(['auto', 'background', 'write-blocking']),
      complete: true,
      forward: true,
    })
    assert.ok(id.startsWith('migrate-'))
  }

  /** Happens within the call; what is struck is there again when the promise resolves. */
  async strike(strike: Strike, losesPower: boolean): Promise<void> {
    this.#isStruck = true
    const keep = losesPower ? 'none' : undefined
    const { source, target, wire, guest } = this
    const hasMoved = source.catalog.list('disk')[0]?.away?.state === 'moved'
    const isSourceDead = strike === 'source dies' || strike === 'both die'
    const isTargetDead = strike === 'target dies' || strike === 'both die'
    const nextSource = isSourceDead ? source.fork(keep) : source
    const nextTarget = isTargetDead ? target.fork(keep) : target
    const loses = losesPower && (hasMoved ? isTargetDead : isSourceDead)
    // What the guest hears from a source that is dead by now it does not hear.
    if (isSourceDead || loses) this.#oldest = (loses ? guest.flushed : guest.acknowledged).slice()
    wire.cut()
    this.source = nextSource
    this.target = nextTarget
    for (const lab of [source, target]) {
      lab.host.beforeOperation = undefined
      lab.catalog.beforeCommit = undefined
    }
    if (isTargetDead) await nextTarget.start()
    this.checkOne('after the target is there again')
    if (isSourceDead) {
      this.wire = new LabWire(nextTarget)
      nextSource.peers = this.wire
      await nextSource.start()
    } else wire.lead(nextTarget)
    this.checkOne('after all is there again')
    // What was struck went on by itself, on a host of its own, and reached nobody.
    for (const [lab, isDead] of [
      [source, isSourceDead],
      [target, isTargetDead],
    ] as const)
      if (isDead) await lab.stop()
  }

  /** Those that would let a guest write. */
  get writers(): readonly Side[] {
    const isOurs = ({ catalog }: Lab): boolean => {
      const record = catalog.list('disk').find(({ name }) => name === 'vm')
      return record !== undefined && record.incoming === undefined && record.away === undefined
    }
    return SIDES.filter((side) => side !== this.#lost && isOurs(this[side]))
  }

  /** Happens within the call: nobody hears from one side ever again. */
  lose(side: Side): void {
    this.#isStruck = true
    this.#lost = side
    this.wire.cut()
    // What the guest hears from a lost source it does not hear.
    if (side === 'source') this.#oldest = this.guest.acknowledged.slice()
    for (const lab of [this.source, this.target]) {
      lab.host.beforeOperation = undefined
      lab.catalog.beforeCommit = undefined
    }
  }

  /** What an operator does at the side that is left. False when it handed the disk over, so that the lost one had it. */
  async force(): Promise<boolean> {
    const { source, target } = this
    if (this.#lost === 'source') {
      await target.engine.settleDisk('vm', true).catch(ignoreSettled)
      return true
    }
    const deadline = performance.now() + PATIENCE_MS
    for (;;) {
      const open = source.engine.listJobs().find(({ endedMs }) => endedMs === undefined)
      const away = source.catalog.list('disk')[0]?.away?.state
      if (away === 'moved') return false
      if (open === undefined) return true
      assert.ok(performance.now() < deadline, `it does not end: ${JSON.stringify(open)}`)
      if (away === 'handed-over') await source.engine.settleDisk('vm', true).catch(ignoreSettled)
      else if (open.state !== 'aborting') await source.engine.sayToJob(open.id, 'cancel').catch(() => undefined)
      await new Promise((resolve) => setTimeout(resolve, 2))
    }
  }

  checkOne(note: string): void {
    assert.ok(this.writers.length <= 1, `${note}: both have the authority`)
  }

  /** Ends what is left, by the one command where it does not end by itself. */
  async settle(): Promise<void> {
    const deadline = performance.now() + PATIENCE_MS
    for (;;) {
      this.checkOne('while it is settled')
      const { engine } = this.source
      const open = engine.listJobs().find(({ endedMs }) => endedMs === undefined)
      if (open === undefined) break
      assert.ok(performance.now() < deadline, `it does not end: ${JSON.stringify(open)}`)
      if (open.state !== 'running' && open.state !== 'ready' && open.state !== 'created')
        await engine.settleDisk('vm', false).catch(() => undefined)
      await new Promise((resolve) => setTimeout(resolve, 2))
    }
  }

  async check(): Promise<void> {
    const { source, target, guest } = this
    const [writer, ...others] = this.writers
    assert.ok(writer !== undefined && others.length === 0, 'one has the authority')
    const lab = writer === 'target' ? target : source
    const shown = lab.engine.showDisk('vm')
    assert.equal(shown.state, 'open', shown.error)
    const content = await readWhole(lab.guest('vm'))
    checkStamps(content, this.#oldest ?? guest.acknowledged, guest.issued, `the disk at the ${writer}`)
    const disk = lab.disk('vm')
    assert.equal(lab.engine.listSnapshots('vm').length, 1)
    assert.ok((await readWhole(disk.chain.viewAt(0))).equals(this.#snapshot), `the snapshot at the ${writer}`)
    const bits = disk.log.bitmaps.get(BITMAP)?.bits
    assert.ok(bits !== undefined, 'the bitmap is there')
    for (let piece = 0; piece < PIECES; piece++) {
      const stamp = content[piece * STAMPED_PIECE]
      if (stamp !== this.#before[piece]) assert.ok(bits.has(piece), `the bitmap misses piece ${piece}`)
    }
  }

  async stop(): Promise<void> {
    this.wire.lead(this.target)
    await this.source.stop()
    await this.target.stop()
  }
}

/** When a strike comes: so many operations after the begin, or after the target had all of the disk. */
interface Moment {
  readonly after: 'begin' | 'seal'
  readonly operations: number
}

/** Migrates under a guest that writes, and strikes. Returns how many operations there were. */
async function run(seed: number, strike?: Strike, at?: Moment, losesPower = false): Promise<number> {
  const world = await World.make(seed)
  let struck: Promise<void> | undefined
  world.count()
  world.onOperation = () => {
    const passed = at?.after === 'seal' ? world.sinceSeal : world.operations
    if (strike !== undefined && passed === at?.operations) struck = world.strike(strike, losesPower)
  }
  // The request itself fails when its daemon dies; a guest's does not come back then.
  const begun = world.begin().catch((error: unknown) => {
    if (struck === undefined) throw error
  })
  const written = world.write(60)
  // Of a source that died it ends as it may.
  written.catch(() => undefined)
  const hasEnded = (): boolean => world.source.engine.listJobs().every(({ endedMs }) => endedMs !== undefined)
  const deadline = performance.now() + PATIENCE_MS
  let isBegun = false
  void begun.then(() => (isBegun = true))
  while (struck === undefined && !(isBegun && hasEnded())) {
    world.checkOne('under way')
    assert.ok(performance.now() < deadline, JSON.stringify(world.source.engine.listJobs()))
    await new Promise((resolve) => setTimeout(resolve, 1))
  }
  // One that ended before its strike goes unstruck.
  world.onOperation = undefined
  if (struck === undefined) await written
  await struck
  await Promise.race([begun, new Promise((resolve) => setTimeout(resolve, 200))])
  await world.settle()
  if (strike === 'target dies' || strike === 'line is cut') await written
  await world.check()
  await world.stop()
  return world.operations
}

test('a migration that nothing strikes ends at the target', async () => {
  const seed = seedOfRun()
  await run(seed)
})

for (const strike of STRIKES) {
  test(`${strike} at a durable write: never two writers, and one in the end with all that was acknowledged`, async () => {
    const seed = seedOfRun()
    const random = new Random(seed)
    const most = await run(seed)
    for (let round = 0; round < ROUNDS; round++) {
      // The switch-over is short, and the place where two could come to be.
      const at: Moment =
        round % 2 === 0
          ? { after: 'begin', operations: 1 + random.below(most) }
          : { after: 'seal', operations: 1 + random.below(8) }
      const losesPower = strike !== 'line is cut' && random.chance(0.5)
      try {
        await run(seed + round, strike, at, losesPower)
      } catch (error) {
        const how = losesPower ? 'with a power loss' : 'by a kill'
        const what = error instanceof Error ? (error.stack ?? error.message) : String(error)
        throw new Error(`seed ${seed} round ${round}, ${strike} ${how} at ${JSON.stringify(at)} of ${most}: ${what}`)
      }
    }
  })
}

/** It may have been settled, or about to be, when it was asked for. */
function ignoreSettled(error: unknown): void {
  if (!isBlockError(error, 'busy') && !isBlockError(error, 'invalid-argument')) throw error
}

for (const side of SIDES) {
  test(`the ${side} lost for ever in a switch-over: --settle --force makes the other side's copy the disk, with all that was acknowledged`, async () => {
    const seed = seedOfRun()
    let forced = 0
    for (let operations = 1; operations <= 8; operations++) {
      const world = await World.make(seed + operations)
      let isLost = false
      world.count()
      world.onOperation = () => {
        if (isLost || world.sinceSeal < operations) return
        isLost = true
        world.lose(side)
      }
      world.begin().catch(() => undefined)
      const written = world.write(60)
      written.catch(() => undefined)
      const hasEnded = (): boolean => world.source.engine.listJobs().some(({ endedMs }) => endedMs !== undefined)
      while (!isLost && !hasEnded()) await new Promise((resolve) => setTimeout(resolve, 1))
      world.onOperation = undefined
      if (isLost && (await world.force())) {
        if (side === 'target') await written
        await world.check()
        forced++
      }
      await world.stop()
    }
    assert.ok(forced > 0, 'some were lost before they ended')
  })
}
