// What must be true of an engine that opens after a crash (engine-life.ts): the disk, every snapshot and every clone show what they
// may, none that must be there is missing, the jobs go on and end, every bitmap has what it must have and covers what changed since its
// backup, no file is left over. Also, where asked for, the next backup into each repository is an incremental if there was one before, and
// shows the disk; and the earlier ones are as they were.

import assert from 'node:assert/strict'
import type { BlockDevice } from '../../src/block/device.ts'
import { readWhole } from '../support/lab.ts'
import { type Crash, DISK, type DoneBackup, readBackup, REPOSITORIES } from './engine-life.ts'
import { checkTracked } from './tracked-check.ts'
import { BLOCK, type Bounds, checkContent, exactly, PIECES, tookEffect } from './versioned-guest.ts'

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
  const { bitmaps } = lab.disk(DISK).log
  const took = tookEffect(content, crash.acknowledged)
  const tracked = checkTracked(crash.bitmaps, bitmaps, loss, took, note)
  await checkCover(crash, content, note)
  const seen = { ...(await checkMoments(crash, note)), bitmaps: tracked, jobs }
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
async function checkCover({ lab, backups }: Crash, content: Buffer, note: string): Promise<void> {
  const locations = new Map<string, string>()
  for (const location of REPOSITORIES) {
    const repository = await lab.repository(location)
    locations.set(`backup:${repository.id}`, location)
    await repository.close()
  }
  for (const [name, { state, meta, bits }] of lab.disk(DISK).log.bitmaps) {
    const location = locations.get(name)
    if (location === undefined) continue
    const { last } = JSON.parse(meta) as { last?: string }
    assert.equal(state, 'valid', `${note}: bitmap ${name}`)
    if (last === undefined) continue
    const before = backups.get(last)?.shown ?? (await readBackup(lab, last, location))
    for (let at = 0; at < content.length; at += BLOCK) {
      const isEqual = content.subarray(at, at + BLOCK).equals(before.subarray(at, Math.min(at + BLOCK, content.length)))
      assert.ok(isEqual || bits.hasAny(at, 1), `${note}: block ${at / BLOCK} is not in bitmap ${name}`)
    }
  }
}

/** A backup taken now into either repository equals the disk, and is an incremental where there is one already; the earlier ones are as they were. */
async function checkBackups(crash: Crash, content: Buffer, note: string): Promise<void> {
  const { lab, backups } = crash
  for (const repository of REPOSITORIES) {
    const job = await lab.engine.backup({ disks: [DISK], repository, full: false, speed: 0 })
    const ended = await lab.engine.jobEnded(job.id)
    assert.equal(ended.error, undefined, note)
    const [disk] = ended.details['disks'] as readonly { readonly kind: string; readonly reason: string }[]
    const isFirst = ![...backups.values()].some((done) => done.repository === repository)
    assert.ok(isFirst || disk?.kind === 'incremental', `${note}: a full into ${repository}, since ${disk?.reason}`)
    const shown = await readBackup(lab, String(ended.details['backup']), repository)
    assert.ok(shown.equals(content), `${note}: the backup into ${repository} differs from the disk`)
  }
  for (const [id, done] of backups) await checkKept(crash, id, done, note)
}

async function checkKept({ lab }: Crash, id: string, { repository, shown }: DoneBackup, note: string): Promise<void> {
  const now = await readBackup(lab, id, repository)
  checkContent(now, [exactly(shown, Math.floor(shown.length / BLOCK))], BLOCK, `${note}, backup ${id}`)
}
