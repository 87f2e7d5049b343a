// A stream through a crash at every operation of the host, from its first to its last: what a kill and what a power loss would leave
// is opened again. The disk holds every acknowledged (or flushed) write, the stream goes on and ends, nothing is left over,
// and the images that remain need no other.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { Random, seedOfRun } from '../../src/base/random.ts'
import { createQcow2 } from '../../src/format/qcow2/create.ts'
import { openQcow2 } from '../../src/format/qcow2/image.ts'
import { Lab, readWhole } from '../support/lab.ts'
import { checkStamps, StampingGuest, STAMPED_PIECE } from '../support/stamping-guest.ts'

const CLUSTER = 65_536
const SIZE = 16 * CLUSTER
const TEMPLATE = '/images/base'

interface Setting {
  readonly title: string
  /** Snapshot that stays below, and the layer that takes what lies between. */
  readonly base?: string
  readonly to?: string
  /** Layers that are left, and snapshots. */
  readonly left: readonly string[]
  readonly snapshots: readonly string[]
}

const OVERLAYS = ['/images/top', '/images/vm.varve-1.qcow2', '/images/vm.varve-2.qcow2'] as const

const SETTINGS: readonly Setting[] = [
  { title: 'of all layers into the active one', left: [OVERLAYS[2]], snapshots: [] },
  { title: 'down to a base into the active layer', base: 'base', left: [TEMPLATE, OVERLAYS[2]], snapshots: [] },
  { title: 'of the lower layers into a snapshot', to: 's2', left: [OVERLAYS[1], OVERLAYS[2]], snapshots: ['s2'] },
]

/** What a kill, which loses nothing, or a power loss took. */
type Lost = 'nothing' | 'all unsynced' | 'some unsynced'

interface Crash {
  readonly lab: Lab
  readonly note: string
  readonly oldest: Uint8Array
  readonly newest: Uint8Array
}

async function makeDisk(random: Random, guest: StampingGuest): Promise<Lab> {
  const lab = await Lab.create(random.chance(0.5) ? new Random(random.next()) : undefined)
  await createQcow2(lab.host, TEMPLATE, { size: SIZE })
  const template = await openQcow2(lab.host, TEMPLATE, { name: 'base' })
  await template.setAccess('write')
  for (let write = 0; write < 30; write++) await guest.write(template, random.below(SIZE / STAMPED_PIECE))
  await guest.flush(template)
  await template.close()
  await createQcow2(lab.host, OVERLAYS[0], { size: SIZE, backing: { name: 'base', format: 'qcow2' } })
  await lab.engine.addDisk('vm', OVERLAYS[0], 'qcow2')
  for (const snapshot of ['s1', 's2', undefined]) {
    for (let write = 0; write < 30; write++) await guest.write(lab.guest('vm'), random.below(SIZE / STAMPED_PIECE))
    if (snapshot !== undefined) await lab.engine.createSnapshot('vm', snapshot)
    else await guest.flush(lab.guest('vm'))
  }
  // What nobody flushed has already given the active layer clusters when the stream begins, and a power loss takes them.
  for (let write = 0; write < 30; write++) await guest.write(lab.guest('vm'), random.below(SIZE / STAMPED_PIECE))
  return lab
}

/** Streams while the guest writes; sets aside what crashes at each operation of the host leave. */
async function collect(random: Random, setting: Setting): Promise<Crash[]> {
  const guest = new StampingGuest(SIZE)
  const lab = await makeDisk(random, guest)
  const crashes: Crash[] = []
  const setAside = (lost: Lost, number: number): void => {
    const keep = { nothing: undefined, 'all unsynced': 'none', 'some unsynced': random } as const
    crashes.push({
      lab: lab.fork(keep[lost]),
      note: `${lost} lost at operation ${number}`,
      oldest: (lost === 'nothing' ? guest.acknowledged : guest.flushed).slice(),
      newest: guest.issued.slice(),
    })
  }
  lab.host.beforeOperation = ({ number }) => {
    setAside('all unsynced', number)
    setAside(number % 2 === 0 ? 'nothing' : 'some unsynced', number)
  }
  const { id } = await lab.engine.stream('vm', setting.base, setting.to)
  const ended = lab.engine.jobEnded(id)
  for (let write = 0; write < 30; write++) {
    await guest.write(lab.guest('vm'), random.below(SIZE / STAMPED_PIECE))
    if (write % 10 === 9) await guest.flush(lab.guest('vm'))
  }
  assert.equal((await ended).error, undefined)
  lab.host.beforeOperation = undefined
  await lab.stop()
  return crashes
}

async function checkCrash({ lab, note, oldest, newest }: Crash, setting: Setting): Promise<boolean> {
  await lab.start()
  const wasGoingOn = lab.engine.listJobs().some(({ endedMs }) => endedMs === undefined)
  const atOnce = lab.engine.showDisk('vm')
  assert.equal(atOnce.error, undefined, note)
  await lab.jobsEnd()
  const isDone = lab.engine.showDisk('vm').layers.length === setting.left.length
  for (const restart of [false, true]) {
    if (restart) {
      await lab.stop()
      if (isDone && !setting.left.includes(TEMPLATE)) await lab.host.unlink(TEMPLATE)
      await lab.start()
    }
    checkStamps(await readWhole(lab.guest('vm')), oldest, newest, `${note}, restart ${restart}`)
  }
  assert.deepEqual(lab.catalog.list('garbage'), [], note)
  assert.equal(lab.disk('vm').log.bitmaps.size, 0, note)
  if (isDone) {
    const layers = lab.engine.showDisk('vm').layers.map(({ path }) => path)
    assert.deepEqual(layers, setting.left, note)
    assert.deepEqual(
      lab.engine.listSnapshots('vm').map(({ name }) => name),
      setting.snapshots,
    )
    const names = (await lab.host.list('/images')).map((name) => `/images/${name}`)
    const mine = names.filter((name) => name !== TEMPLATE && name !== OVERLAYS[0])
    assert.deepEqual(mine.sort(), setting.left.filter((name) => mine.includes(name)).toSorted(), note)
  }
  await lab.stop()
  return wasGoingOn
}

for (const setting of SETTINGS) {
  test(`a stream ${setting.title} goes on after a crash at any operation, and no write is lost`, async (t) => {
    const random = new Random(seedOfRun())
    t.diagnostic(`VARVE_SEED=${random.seed}`)
    const crashes = await collect(random, setting)
    let resumed = 0
    for (const crash of crashes) {
      if (await checkCrash({ ...crash, note: `VARVE_SEED=${random.seed}: ${crash.note}` }, setting)) resumed++
    }
    t.diagnostic(`${crashes.length} crashes, the stream went on after ${resumed}`)
    assert.ok(resumed > 10 && resumed < crashes.length)
  })
}
