import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { failsWith } from '../../test/support/backups.ts'
import type { BackupInfo } from './manifest.ts'
import { type Retention, retain } from './retention.ts'

const HOUR = 3_600_000
const DAY = 24 * HOUR
/** Wednesday. */
const NOON = Date.UTC(2026, 0, 7, 12)

/** A backup that is known by its moment. */
function backupAt(moment: number, machine = 'vm1', disk = 'sda'): BackupInfo {
  return { id: `${machine}/${disk}/${moment}`, moment, machine, disks: [{ name: disk }] } as unknown as BackupInfo
}

function keptMoments(backups: readonly BackupInfo[], policy: Retention, tags = new Map<string, string[]>()): number[] {
  const { kept, forgotten } = retain(backups, tags, policy)
  assert.equal(kept.length + forgotten.length, backups.length)
  const ids = new Set(kept.map(({ id }) => id))
  return backups.filter(({ id }) => ids.has(id)).map(({ moment }) => moment)
}

suite('retention', () => {
  test('the last few are the newest, in any order of the list', () => {
    const backups = [3, 1, 2, 5, 4].map((day) => backupAt(day * DAY))
    assert.deepEqual(keptMoments(backups, { last: 2 }), [5 * DAY, 4 * DAY])
    assert.equal(keptMoments(backups, { last: 99 }).length, 5)
  })

  test('of each day the newest stays, and days without a backup do not count', () => {
    const backups = [0, 1, 2, 10].flatMap((day) => [backupAt(NOON - day * DAY), backupAt(NOON - day * DAY - HOUR)])
    assert.deepEqual(
      keptMoments(backups, { daily: 4 }),
      [0, 1, 2, 10].map((day) => NOON - day * DAY),
    )
    assert.deepEqual(keptMoments(backups, { daily: 2 }), [NOON, NOON - DAY])
  })

  test('hours, weeks from Monday, months and years are those of UTC', () => {
    const hours = [0, 1, 61, 119].map((minutes) => backupAt(NOON - minutes * 60_000))
    assert.deepEqual(keptMoments(hours, { hourly: 9 }), [NOON, NOON - 60_000, NOON - 61 * 60_000])
    const monday = Date.UTC(2026, 0, 5)
    assert.deepEqual(keptMoments([backupAt(monday - 1), backupAt(monday), backupAt(NOON)], { weekly: 2 }), [
      monday - 1,
      NOON,
    ])
    const newYear = Date.UTC(2026, 0, 1)
    const turns = [backupAt(newYear - 1), backupAt(newYear), backupAt(NOON)]
    assert.deepEqual(keptMoments(turns, { monthly: 2 }), [newYear - 1, NOON])
    assert.deepEqual(keptMoments(turns, { yearly: 2 }), [newYear - 1, NOON])
    assert.deepEqual(keptMoments(turns, { yearly: 1 }), [NOON])
  })

  test('rules add up, and each says that it keeps', () => {
    const backups = Array.from({ length: 400 }, (_, day) => backupAt(NOON - day * DAY))
    const tags = new Map([[`vm1/sda/${NOON - 300 * DAY}`, ['gold', 'other']]])
    const policy = { last: 3, daily: 7, weekly: 4, monthly: 12, yearly: 2, tags: ['gold'] }
    const { kept } = retain(backups, tags, policy)
    assert.deepEqual(kept[0]?.reasons, ['last', 'daily', 'weekly', 'monthly', 'yearly'])
    assert.deepEqual(kept.find(({ id }) => id.endsWith(String(NOON - 300 * DAY)))?.reasons, ['tag gold'])
    // Seven days, two more weeks, eleven more months (the last of them also the other year's), and the tag.
    assert.equal(kept.length, 7 + 2 + 11 + 1)
  })

  test('machines, and other sets of disks of one, do not compete', () => {
    const backups = [backupAt(1, 'vm1'), backupAt(2, 'vm2'), backupAt(3, 'vm1', 'sdb'), backupAt(4, 'vm1')]
    assert.deepEqual(keptMoments(backups, { last: 1 }), [2, 3, 4])
  })

  test('a policy that keeps nothing, or a number that is none, is refused', async () => {
    for (const policy of [{}, { last: 0 }, { tags: ['gold'] }]) {
      await failsWith('invalid-argument', () => retain([], new Map(), policy), /keep-last 1/)
    }
    for (const daily of [-1, 1.5, Number.NaN]) {
      await failsWith('invalid-argument', () => retain([], new Map(), { daily }), /keep-daily/)
    }
  })
})
