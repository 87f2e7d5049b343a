// A live restore through a crash at every change of the host's files, from the first to the last: what a kill and what a power loss would
// leave is opened again. There is no disk, or one that holds the backup and every acknowledged (or flushed) write since; the restore goes
// on and ends, the image then needs no backup, the bitmap covers what was written, and nothing is held or left over.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { Random, seedOfRun } from '../../src/base/random.ts'
import { openQcow2 } from '../../src/format/qcow2/image.ts'
import { Lab, LAB_REPOSITORY, readWhole } from '../support/lab.ts'
import { checkStamps, StampingGuest, STAMPED_PIECE } from '../support/stamping-guest.ts'

const CLUSTER = 65_536
const SIZE = 12 * CLUSTER
const IMAGE = '/images/vm.qcow2'
const WRITES = 30

/** What a kill, which loses nothing, or a power loss took. */
type Lost = 'nothing' | 'all unsynced' | 'some unsynced'

interface Crash {
  readonly lab: Lab
  readonly note: string
  /** The command had come back: the disk must be there. */
  readonly isMade: boolean
  readonly oldest: Uint8Array
  readonly newest: Uint8Array
}

/** A lab with a backup of a disk of another name. */
async function makeBackup(random: Random, guest: StampingGuest): Promise<{ lab: Lab; backup: string }> {
  const lab = await Lab.create(random.chance(0.5) ? new Random(random.next()) : undefined)
  await lab.engine.createDisk('old', '/images/old.qcow2', 'qcow2', SIZE)
  for (let write = 0; write < 2 * WRITES; write++)
    await guest.write(lab.guest('old'), random.below(SIZE / STAMPED_PIECE))
  await guest.flush(lab.guest('old'))
  const { id } = await lab.engine.backup({ disks: ['old'], repository: LAB_REPOSITORY, full: false })
  const { details } = await lab.engine.jobEnded(id)
  await lab.engine.removeDisk('old')
  return { lab, backup: String(details['backup']) }
}

/** Restores while the guest writes; sets aside what crashes at operations of the host leave. */
async function collect(random: Random): Promise<Crash[]> {
  const guest = new StampingGuest(SIZE)
  const { lab, backup } = await makeBackup(random, guest)
  const crashes: Crash[] = []
  let isMade = false
  const setAside = (lost: Lost, number: number): void => {
    const keep = { nothing: undefined, 'all unsynced': 'none', 'some unsynced': random } as const
    crashes.push({
      lab: lab.fork(keep[lost]),
      note: `${lost} lost at operation ${number}`,
      isMade,
      oldest: (lost === 'nothing' ? guest.acknowledged : guest.flushed).slice(),
      newest: guest.issued.slice(),
    })
  }
  lab.host.beforeOperation = ({ kind, number }) => {
    // What only reads leaves what the operation before it left.
    if (kind === 'read' || kind === 'open') return
    setAside(number % 2 === 0 ? 'all unsynced' : number % 4 === 1 ? 'nothing' : 'some unsynced', number)
  }
  const { id } = await lab.engine.restore({ name: 'vm', repository: LAB_REPOSITORY, backup, image: IMAGE })
  isMade = true
  const ended = lab.engine.jobEnded(id)
  for (let write = 0; write < WRITES; write++) {
    await guest.write(lab.guest('vm'), random.below(SIZE / STAMPED_PIECE))
    if (write % 10 === 9) await guest.flush(lab.guest('vm'))
  }
  assert.equal((await ended).error, undefined)
  lab.host.beforeOperation = undefined
  await lab.stop()
  return crashes
}

/** Opens what a crash left; returns whether a restore went on there. */
async function checkCrash({ lab, note, isMade, oldest, newest }: Crash): Promise<boolean> {
  await lab.start()
  const isThere = lab.engine.listDisks().length > 0
  if (!isThere) {
    assert.ok(!isMade, `${note}: the disk is gone`)
    await lab.stop()
    return false
  }
  const wasGoingOn = lab.engine.listJobs().some(({ endedMs }) => endedMs === undefined)
  assert.equal(lab.engine.showDisk('vm').error, undefined, note)
  checkStamps(await readWhole(lab.guest('vm')), oldest, newest, `${note}, at once`)
  await lab.jobsEnd()
  checkStamps(await readWhole(lab.guest('vm')), oldest, newest, `${note}, at the end`)
  assert.deepEqual(lab.engine.showDisk('vm').layers, [{ path: IMAGE, format: 'qcow2', made: true }], note)
  assert.deepEqual(lab.catalog.list('garbage'), [], note)
  await checkNextBackup(lab, note)
  await lab.stop()
  const image = await openQcow2(lab.host, IMAGE, { name: 'vm' })
  assert.equal(image.backingReference, undefined, note)
  checkStamps(await readWhole(image), oldest, newest, `${note}, the image alone`)
  await image.close()
  return wasGoingOn
}

/** It is incremental against the backup that was restored, and exact. */
async function checkNextBackup(lab: Lab, note: string): Promise<void> {
  const { id } = await lab.engine.backup({ disks: ['vm'], repository: LAB_REPOSITORY, full: false })
  const { details, error } = await lab.engine.jobEnded(id)
  assert.equal(error, undefined, note)
  const [{ kind, reason }] = details['disks'] as [{ kind: string; reason: string }]
  assert.equal(kind, 'incremental', `${note}: ${reason}`)
  const repository = await lab.repository()
  const reader = await repository.openBackup(String(details['backup']))
  const device = reader.disks[0]?.device
  assert.ok(device !== undefined && (await readWhole(device)).equals(await readWhole(lab.guest('vm'))), note)
  await repository.close()
}

test('a live restore goes on after a crash at any moment, no write is lost, and the next backup is incremental', async (t) => {
  const random = new Random(seedOfRun())
  t.diagnostic(`VARVE_SEED=${random.seed}`)
  const crashes = await collect(random)
  let resumed = 0
  for (const crash of crashes) {
    if (await checkCrash({ ...crash, note: `VARVE_SEED=${random.seed}: ${crash.note}` })) resumed++
  }
  t.diagnostic(`${crashes.length} crashes, the restore went on after ${resumed}`)
  assert.ok(resumed > 10 && resumed < crashes.length)
})
