// A mirror through crashes at operations of the host, from its first to its last: what a kill and what a power loss would
// leave is opened again. The disk holds every acknowledged (or flushed) write, the mirror goes on and ends, and then the
// target equals the disk, or is the disk.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { Random, seedOfRun } from '../../src/base/random.ts'
import { type Format, openChain, openLayer } from '../../src/chain/open.ts'
import type { Layer } from '../../src/block/device.ts'
import { createQcow2 } from '../../src/format/qcow2/create.ts'
import type { MirrorRequest } from '../../src/engine/mirrors.ts'
import type { MirrorFinish, MirrorMode } from '../../src/job/mirror.ts'
import { Lab, readWhole } from '../support/lab.ts'
import { checkStamps, StampingGuest, STAMPED_PIECE } from '../support/stamping-guest.ts'

const CLUSTER = 65_536
const SIZE = 16 * CLUSTER
const PIECES = SIZE / STAMPED_PIECE
const BASE = '/images/base'
const OVERLAY = '/images/vm.varve-1.qcow2'
const TARGET = '/images/target'

interface Setting {
  readonly title: string
  readonly format: Format
  readonly mode: MirrorMode
  readonly finish: MirrorFinish
  readonly sync?: 'full' | 'top'
  /** The target is there before, full of something else. */
  readonly existing?: boolean
  /** The disk's layers after a pivot. */
  readonly left?: readonly string[]
}

const SETTINGS: readonly Setting[] = [
  { title: 'to a new raw image, in the background', format: 'raw', mode: 'background', finish: 'copy' },
  {
    title: 'over an old qcow2 image, writing to both',
    format: 'qcow2',
    mode: 'write-blocking',
    finish: 'copy',
    existing: true,
  },
  { title: 'with a pivot to a new image', format: 'qcow2', mode: 'auto', finish: 'pivot', left: [TARGET] },
  { title: 'of the top to a copy', format: 'qcow2', mode: 'background', finish: 'copy', sync: 'top' },
  {
    title: 'of the top with a pivot',
    format: 'qcow2',
    mode: 'background',
    finish: 'pivot',
    sync: 'top',
    left: [BASE, TARGET],
  },
]

/** What a kill, which loses nothing, or a power loss took. */
const LOSSES = ['nothing', 'all unsynced', 'some unsynced'] as const
type Lost = (typeof LOSSES)[number]
/** One of so many operations is a crash; with VARVE_CRASH_EVERY=1 each of them. */
const CRASH_EVERY = Number(process.env['VARVE_CRASH_EVERY'] ?? 6)

interface Crash {
  readonly lab: Lab
  readonly note: string
  readonly oldest: Uint8Array
  readonly newest: Uint8Array
}

async function makeDisk(random: Random, guest: StampingGuest, setting: Setting): Promise<Lab> {
  const lab = await Lab.create(random.chance(0.5) ? new Random(random.next()) : undefined)
  await createQcow2(lab.host, BASE, { size: SIZE })
  await lab.engine.addDisk('vm', BASE, 'qcow2')
  for (const snapshot of ['s1', undefined]) {
    for (let write = 0; write < 40; write++) await guest.write(lab.guest('vm'), random.below(PIECES))
    if (snapshot !== undefined) await lab.engine.createSnapshot('vm', snapshot)
    else await guest.flush(lab.guest('vm'))
  }
  for (let write = 0; write < 20; write++) await guest.write(lab.guest('vm'), random.below(PIECES))
  if (setting.existing === true) await makeOld(lab, setting.format)
  return lab
}

async function makeOld(lab: Lab, format: Format): Promise<void> {
  await createQcow2(lab.host, TARGET, { size: SIZE })
  const old = await openLayer(lab.host, TARGET, format, 'old')
  await old.setAccess('write')
  await old.write(0, SIZE, Buffer.alloc(SIZE, 0xff), 0, 0)
  await old.close()
}

function requestOf({ format, mode, finish, sync = 'full', existing = false }: Setting): MirrorRequest {
  return { target: TARGET, format, sync, mode, existing, finish, speed: 0 }
}

/** Mirrors while the guest writes; sets aside what crashes at each operation of the host leave. */
async function collect(random: Random, setting: Setting): Promise<Crash[]> {
  const guest = new StampingGuest(SIZE)
  const lab = await makeDisk(random, guest, setting)
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
    if (random.chance(1 / CRASH_EVERY)) setAside(random.pick(LOSSES), number)
  }
  const { id } = await lab.engine.mirror('vm', requestOf(setting))
  const ended = lab.engine.jobEnded(id)
  for (let write = 0; write < 30; write++) {
    await guest.write(lab.guest('vm'), random.below(PIECES))
    if (write % 10 === 9) await guest.flush(lab.guest('vm'))
    // What was copied and settled by now is done for good, also for a power loss, until the guest's next write.
    if (write % 5 === 4) await lab.disk('vm').log.fold()
  }
  assert.equal((await ended).error, undefined)
  setAside('nothing', lab.host.operations)
  lab.host.beforeOperation = undefined
  await lab.stop()
  return crashes
}

async function checkCrash({ lab, note, oldest, newest }: Crash, setting: Setting): Promise<boolean> {
  await lab.start()
  const wasGoingOn = lab.engine.listJobs().some(({ endedMs }) => endedMs === undefined)
  assert.equal(lab.engine.showDisk('vm').error, undefined, note)
  await lab.jobsEnd()
  const disk = await readWhole(lab.guest('vm'))
  checkStamps(disk, oldest, newest, note)
  assert.equal(lab.disk('vm').log.bitmaps.size, 0, note)
  assert.deepEqual(lab.catalog.list('garbage'), [], note)
  const layers = lab.engine.showDisk('vm').layers.map(({ path }) => path)
  const isLeft = setting.left !== undefined && layers.at(-1) === TARGET
  assert.deepEqual(layers, isLeft ? setting.left : [BASE, OVERLAY], note)
  if (wasGoingOn) assert.equal(isLeft, setting.finish === 'pivot', note)
  await lab.stop()
  if (isLeft) await needsNoOther(lab, setting.left ?? [], disk, note)
  else if (wasGoingOn) assert.ok((await readTarget(lab, setting.format)).equals(disk), `${note}: the target differs`)
  return wasGoingOn
}

async function readTarget(lab: Lab, format: Format): Promise<Buffer> {
  const layers = await openChain({ host: lab.host, path: TARGET, format })
  try {
    return await readWhole(layers.at(-1) as Layer)
  } finally {
    for (const layer of layers.toReversed()) await layer.close()
  }
}

/** The disk is whole without the images that it has left. */
async function needsNoOther(lab: Lab, left: readonly string[], disk: Buffer, note: string): Promise<void> {
  for (const image of [BASE, OVERLAY]) if (!left.includes(image)) await lab.host.unlink(image)
  await lab.start()
  assert.ok((await readWhole(lab.guest('vm'))).equals(disk), `${note}: the disk needs what it left`)
  await lab.stop()
}

for (const setting of SETTINGS) {
  test(`a mirror ${setting.title} goes on after a crash, and no write is lost`, async (t) => {
    const random = new Random(seedOfRun())
    t.diagnostic(`VARVE_SEED=${random.seed}`)
    const crashes = await collect(random, setting)
    let resumed = 0
    for (const crash of crashes) {
      if (await checkCrash({ ...crash, note: `VARVE_SEED=${random.seed}: ${crash.note}` }, setting)) resumed++
    }
    t.diagnostic(`${crashes.length} crashes, the mirror went on after ${resumed}`)
    assert.ok(resumed > 10 && resumed < crashes.length)
  })
}
