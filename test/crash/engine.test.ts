// The whole engine through crashes: a guest writes stamped blocks while snapshots, commits, streams, clones, resizes and backups are
// made, and at random operations of the host what a kill or a power loss would leave is set aside. Each is then opened: every
// acknowledged (or flushed) write is there, the jobs end, snapshots and clones show their moment, the next backup's restore equals
// the disk, earlier backups are as they were.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { getUint32, setUint32 } from '../../src/base/bytes.ts'
import { Random, seedOfRun } from '../../src/base/random.ts'
import type { BlockDevice } from '../../src/block/device.ts'
import { isBlockError } from '../../src/block/error.ts'
import type { JobStatus } from '../../src/job/job.ts'
import { Lab, LAB_REPOSITORY, readWhole } from '../support/lab.ts'

const SIZE = 2 * 1024 * 1024
const BLOCK = 4096
const BLOCKS = SIZE / BLOCK
/** Rounds on a host that answers at once and on one that answers late, in turn; more for a long run. */
const ROUNDS = Number(process.env['VARVE_ROUNDS'] ?? 2)

/** A guest that stamps blocks with growing numbers and knows what was issued, acknowledged and flushed. */
class Guest {
  readonly issued = new Uint32Array(BLOCKS)
  readonly acknowledged = new Uint32Array(BLOCKS)
  readonly flushed = new Uint32Array(BLOCKS)
  #next = 1

  async write(device: BlockDevice, block: number): Promise<void> {
    const stamp = this.#next++
    this.issued[block] = stamp
    await device.write(block * BLOCK, BLOCK, stampedBlock(stamp), 0, 0)
    this.acknowledged[block] = stamp
  }

  async flush(device: BlockDevice): Promise<void> {
    const before = this.acknowledged.slice()
    await device.flush()
    this.flushed.set(before)
  }

  /** What a block may hold: after a kill from the acknowledged on, after a power loss from the flushed on. */
  bounds(oldest: 'acknowledged' | 'flushed'): { oldest: Uint32Array; newest: Uint32Array } {
    return { oldest: this[oldest].slice(), newest: this.issued.slice() }
  }
}

function stampedBlock(stamp: number): Buffer {
  const block = Buffer.alloc(BLOCK)
  for (let at = 0; at < BLOCK; at += 4) setUint32(block, at, stamp)
  return block
}

interface Bounds {
  readonly oldest: Uint32Array
  readonly newest: Uint32Array
}

/** What was not flushed may be torn by a power loss, at sectors; a kill tears nothing. */
const PIECES = { kill: BLOCK, power: 512 } as const

function checkContent(bytes: Buffer, bounds: Bounds, piece: number, note: string): void {
  for (let at = 0; at < SIZE; at += piece) {
    const block = Math.floor(at / BLOCK)
    const stamp = getUint32(bytes, at)
    const isWhole = bytes.subarray(at, at + piece).equals(stampedBlock(stamp).subarray(0, piece))
    assert.ok(isWhole, `${note}: block ${block} is not whole`)
    const oldest = bounds.oldest[block] as number
    const newest = bounds.newest[block] as number
    assert.ok(stamp >= oldest && stamp <= newest, `${note}: block ${block} holds ${stamp}, not ${oldest} to ${newest}`)
  }
}

interface Crash {
  readonly lab: Lab
  readonly kind: 'kill' | 'power'
  readonly operation: number
  readonly bounds: Bounds
  /** Backups that were reported done by then, and what they must show. */
  readonly backups: ReadonlyMap<string, Bounds>
  /** What each snapshot must show, if there is one, and each clone. */
  readonly moments: ReadonlyMap<string, Bounds>
}

/** What was made by then, and what it must show. */
interface Made {
  readonly backups: Map<string, Bounds>
  /** By the names of snapshots and clones. */
  readonly moments: Map<string, Bounds>
}

/** Runs guest and commands, on a host that answers at once or late, setting aside a crash at about one in `every` operations of the host. */
async function collectCrashes(random: Random, every: number, steps: number, isLate: boolean): Promise<Crash[]> {
  const lab = await Lab.create(isLate ? new Random(random.next()) : undefined)
  await lab.engine.createDisk('vm1', '/images/vm1.qcow2', 'qcow2', SIZE)
  const guest = new Guest()
  const crashes: Crash[] = []
  const made: Made = { backups: new Map(), moments: new Map() }
  lab.host.beforeOperation = ({ number }) => {
    if (!random.chance(1 / every)) return
    const kind = random.pick(['kill', 'power'] as const)
    crashes.push({
      lab: lab.fork(kind === 'kill' ? undefined : random),
      kind,
      operation: number,
      bounds: guest.bounds(kind === 'kill' ? 'acknowledged' : 'flushed'),
      backups: new Map(made.backups),
      moments: new Map(made.moments),
    })
  }
  // One command that changes the chain at a time, and beside it a backup.
  const lanes = [chainCommand, backupCommand]
    .map(unlessBusy)
    .map((command) => ({ command, isBusy: false, running: Promise.resolve() }))
  for (let step = 0; step < steps; step++) {
    const device = lab.guest('vm1')
    await Promise.all(Array.from({ length: 4 }, (_, i) => guest.write(device, random.below(BLOCKS / 4) * 4 + i)))
    if (random.chance(0.1)) await guest.flush(device)
    for (const lane of lanes) {
      if (lane.isBusy || !random.chance(0.15)) continue
      lane.isBusy = true
      lane.running = lane.command(lab, guest, random, made).finally(() => {
        lane.isBusy = false
      })
    }
  }
  await Promise.all(lanes.map(({ running }) => running))
  lab.host.beforeOperation = undefined
  await lab.stop()
  return crashes
}

type Command = (lab: Lab, guest: Guest, random: Random, made: Made) => Promise<void>

/** One that has to wait for a job or for a clone changes nothing. */
function unlessBusy(command: Command): Command {
  return async (...given) => {
    try {
      await command(...given)
    } catch (error) {
      if (!isBlockError(error, 'busy')) throw error
    }
  }
}

async function chainCommand(lab: Lab, guest: Guest, random: Random, { moments }: Made): Promise<void> {
  const { engine } = lab
  const layers = engine.showDisk('vm1').layers.length
  const kinds = ['snapshot', 'commit', 'stream', 'delete', 'resize', 'clone', 'remove'] as const
  const kind = layers === 1 ? 'snapshot' : random.pick(kinds)
  if (kind === 'snapshot' && layers < 5) {
    const name = `s${lab.host.operations}`
    const oldest = guest.acknowledged.slice()
    // Until it is known to be taken it may show anything from now on.
    moments.set(name, { oldest, newest: guest.issued })
    await engine.createSnapshot('vm1', name)
    moments.set(name, { oldest, newest: guest.issued.slice() })
  }
  if (kind === 'resize') await engine.resizeDisk('vm1', engine.showDisk('vm1').size + random.between(1, 20) * 512)
  const clones = engine.listDisks().filter(({ name }) => name !== 'vm1')
  const [latest] = engine.listSnapshots('vm1').slice(-1)
  if (kind === 'clone' && latest !== undefined && clones.length < 2) {
    const name = `c${lab.host.operations}`
    moments.set(name, moments.get(latest.name) as Bounds)
    await engine.clone('vm1', latest.name, name)
  }
  const [clone] = clones
  if (kind === 'remove' && clone !== undefined) await engine.removeDisk(clone.name)
  if (kind === 'commit') await succeeds(lab, (await engine.commit('vm1')).id)
  if (kind === 'stream') {
    const to = random.between(1, layers - 1)
    const base = random.between(-1, to - 2)
    const paths = engine.showDisk('vm1').layers.map(({ path }) => path)
    await succeeds(lab, (await engine.stream('vm1', paths[base], paths[to])).id)
  }
  if (kind === 'delete') {
    const snapshot = random.pick(engine.listSnapshots('vm1'))
    if (snapshot !== undefined) await succeeds(lab, (await engine.deleteSnapshot('vm1', snapshot.name)).id)
  }
}

async function backupCommand(lab: Lab, guest: Guest, random: Random, { backups }: Made): Promise<void> {
  const oldest = guest.acknowledged.slice()
  const full = random.chance(0.1)
  const job = await lab.engine.backup({ disks: ['vm1'], repository: LAB_REPOSITORY, full, speed: 0 })
  const newest = guest.issued.slice()
  const ended = await succeeds(lab, job.id)
  backups.set(String(ended.details['backup']), { oldest, newest })
}

async function succeeds(lab: Lab, id: string): Promise<JobStatus> {
  const ended = await lab.engine.jobEnded(id)
  assert.equal(ended.error, undefined)
  return ended
}

/** Snapshots were flushed when they were taken: a power loss takes nothing from them. */
async function checkMoments({ lab, moments }: Crash, note: string): Promise<{ snapshots: number; clones: number }> {
  const { engine } = lab
  const seen = { snapshots: 0, clones: 0 }
  for (const { name: disk, error } of engine.listDisks()) {
    assert.equal(error, undefined, note)
    if (disk !== 'vm1')
      checkContent(await readWhole(lab.guest(disk)), moments.get(disk) as Bounds, BLOCK, `${note}, ${disk}`)
    for (const { name } of engine.listSnapshots(disk)) {
      await engine.exportSnapshot(disk, name)
      const shown = await readWhole(lab.view(`${disk}@${name}`) as BlockDevice)
      checkContent(shown, moments.get(name) as Bounds, BLOCK, `${note}, ${disk}@${name}`)
      await engine.unexportSnapshot(disk, name)
      seen.snapshots++
    }
    if (disk !== 'vm1') seen.clones++
  }
  return seen
}

async function checkCrash(crash: Crash, note: string): Promise<{ snapshots: number; clones: number }> {
  const { lab } = crash
  await lab.start()
  const status = lab.engine.showDisk('vm1')
  assert.equal(status.state, 'open', `${note}: ${status.error}`)
  await lab.jobsEnd()
  const content = await readWhole(lab.guest('vm1'))
  checkContent(content, crash.bounds, PIECES[crash.kind], note)
  const seen = await checkMoments(crash, note)
  const job = await lab.engine.backup({ disks: ['vm1'], repository: LAB_REPOSITORY, full: false, speed: 0 })
  const ended = await lab.engine.jobEnded(job.id)
  assert.equal(ended.error, undefined, note)
  assert.deepEqual(lab.catalog.list('garbage'), [], note)
  await lab.stop()
  const repository = await lab.repository()
  const wanted = new Map<string, Bounds | undefined>([...crash.backups, [String(ended.details['backup']), undefined]])
  for (const [id, bounds] of wanted) {
    const reader = await repository.openBackup(id)
    const device = reader.disks[0]?.device
    assert.ok(device !== undefined)
    const restored = await readWhole(device)
    if (bounds === undefined) assert.ok(restored.equals(content), `${note}: the backup after it differs from the disk`)
    else checkContent(restored, bounds, BLOCK, `${note}, backup ${id}`)
    await reader.close()
  }
  await repository.close()
  return seen
}

test('an engine opened after a kill or a power loss at any moment has lost nothing and ends its jobs', async (t) => {
  const random = new Random(seedOfRun())
  t.diagnostic(`VARVE_SEED=${random.seed}`)
  let checked = 0
  const total = { snapshots: 0, clones: 0 }
  for (let round = 0; round < ROUNDS; round++) {
    const crashes = await collectCrashes(random, 40, 150, round % 2 === 1)
    for (const crash of crashes) {
      const { snapshots, clones } = await checkCrash(
        crash,
        `VARVE_SEED=${random.seed}, round ${round}, ${crash.kind} at operation ${crash.operation}`,
      )
      checked++
      total.snapshots += snapshots
      total.clones += clones
    }
  }
  t.diagnostic(`${checked} crashes, ${total.snapshots} snapshots and ${total.clones} clones`)
  assert.ok(checked > 50, `only ${checked} crashes were made`)
  assert.ok(total.snapshots > 0, 'some of them had a snapshot')
})
