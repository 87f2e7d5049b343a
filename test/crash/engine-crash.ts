// What must be true of an engine that opens after a crash (engine-life.ts): the disk, every snapshot and every clone show what they
// may, none that must be there is missing, the jobs go on and end, every bitmap covers what changed since its backup, no file is left
// over. Also, where asked for, the next backup and the earlier ones.

import assert from 'node:assert/strict'
import type { BlockDevice } from '../../src/block/device.ts'
import { LAB_REPOSITORY, readWhole } from '../support/lab.ts'
import { type Crash, DISK, readBackup } from './engine-life.ts'
import { BLOCK, type Bounds, checkContent, exactly, PIECES } from './versioned-guest.ts'

/** What was looked at. */
export interface Seen {
  snapshots: number
  clones: number
  bitmaps: number
  /** Jobs that went on. */
  jobs: number
}

export const NOTHING_SEEN: Seen = { snapshots: 0, clones: 0, bitmaps: 0, jobs: 0 }

/** Fails when something is not as it must be. */
export async function checkCrash(crash: Crash, note: string, withBackup: boolean): Promise<Seen> {
  const { lab, loss } = crash
  await lab.start()
  const status = lab.engine.showDisk(DISK)
  assert.equal(status.state, 'open', `${note}: ${status.error}`)
  const jobs = lab.engine.listJobs().filter(({ endedMs }) => endedMs === undefined).length
  await lab.jobsEnd()
  const content = await readWhole(lab.guest(DISK))
  checkContent(content, crash.content, loss === 'kill' ? PIECES.kill : PIECES.power, note)
  const seen = { ...(await checkMoments(crash, note)), bitmaps: await checkBitmaps(crash, content, note), jobs }
  if (withBackup) await checkBackups(crash, content, note)
  assert.deepEqual(lab.catalog.list('garbage'), [], note)
  await lab.stop()
  return seen
}

/** Snapshots were flushed when they were taken: a power loss takes nothing from them. */
async function checkMoments({ lab, moments, certain }: Crash, note: string): Promise<Omit<Seen, 'bitmaps' | 'jobs'>> {
  const { engine } = lab
  const found = new Set<string>()
  const seen = { snapshots: 0, clones: 0 }
  const boundsOf = (name: string): Bounds[] => {
    const bounds = moments.get(name)
    assert.ok(bounds !== undefined, `${note}: nobody made ${name}`)
    return [bounds]
  }
  for (const { name: disk, error } of engine.listDisks()) {
    assert.equal(error, undefined, note)
    if (disk !== DISK) {
      checkContent(await readWhole(lab.guest(disk)), boundsOf(disk), BLOCK, `${note}, ${disk}`)
      found.add(disk)
      seen.clones++
    }
    for (const { name, uri } of engine.listSnapshots(disk)) {
      // One that was exported is so again.
      if (uri === undefined) await engine.exportSnapshot(disk, name)
      const shown = await readWhole(lab.view(`${disk}@${name}`) as BlockDevice)
      checkContent(shown, boundsOf(name), BLOCK, `${note}, ${disk}@${name}`)
      await engine.unexportSnapshot(disk, name)
      if (disk === DISK) found.add(name)
      seen.snapshots++
    }
  }
  for (const name of certain) assert.ok(found.has(name), `${note}: ${name} is gone`)
  return seen
}

/** Every block in which the disk differs from a backup is set in the bitmap that counts from it. */
async function checkBitmaps({ lab, backups }: Crash, content: Buffer, note: string): Promise<number> {
  let count = 0
  for (const [name, { state, meta, bits }] of lab.disk(DISK).log.bitmaps) {
    if (!name.startsWith('backup:')) continue
    const { last } = JSON.parse(meta) as { last?: string }
    assert.equal(state, 'valid', `${note}: bitmap ${name}`)
    if (last === undefined) continue
    const before = backups.get(last) ?? (await readBackup(lab, last))
    for (let at = 0; at < content.length; at += BLOCK) {
      const isEqual = content.subarray(at, at + BLOCK).equals(before.subarray(at, Math.min(at + BLOCK, content.length)))
      assert.ok(isEqual || bits.hasAny(at, 1), `${note}: block ${at / BLOCK} is not in bitmap ${name}`)
    }
    count++
  }
  return count
}

/** A backup taken now equals the disk, and the earlier ones are as they were. */
async function checkBackups({ lab, backups }: Crash, content: Buffer, note: string): Promise<void> {
  const job = await lab.engine.backup({ disks: [DISK], repository: LAB_REPOSITORY, full: false, speed: 0 })
  const ended = await lab.engine.jobEnded(job.id)
  assert.equal(ended.error, undefined, note)
  const shown = await readBackup(lab, String(ended.details['backup']))
  assert.ok(shown.equals(content), `${note}: the backup after it differs from the disk`)
  for (const [id, before] of backups) {
    const now = await readBackup(lab, id)
    checkContent(now, [exactly(before, Math.floor(before.length / BLOCK))], BLOCK, `${note}, backup ${id}`)
  }
}
