// Which backups to keep: the newest of so many hours, days, weeks, months and years, the last few, and those with certain tags. Backups of
// different machines or disks do not compete. Pure: it reads nothing and removes nothing.

import { BlockError } from '../block/error.ts'
import type { BackupInfo } from './manifest.ts'

/** How many of each to keep. Periods are those of UTC; weeks begin on Monday. */
export interface Retention {
  readonly last?: number
  readonly hourly?: number
  readonly daily?: number
  readonly weekly?: number
  readonly monthly?: number
  readonly yearly?: number
  /** Whatever has one of these tags stays. */
  readonly tags?: readonly string[]
}

export interface KeptBackup {
  readonly id: string
  /** The rules that keep it: 'last', 'daily', 'tag gold'. */
  readonly reasons: readonly string[]
}

export interface RetentionOutcome {
  readonly kept: readonly KeptBackup[]
  readonly forgotten: readonly string[]
}

type Rule = 'last' | 'hourly' | 'daily' | 'weekly' | 'monthly' | 'yearly'

const DAY_MS = 86_400_000
const isoText = (moment: number): string => new Date(moment).toISOString()

/** The period of each rule that a moment lies in: two backups of one period are one to the rule. */
const PERIODS: Readonly<Record<Rule, (moment: number, id: string) => string>> = {
  last: (_moment, id) => id,
  hourly: (moment) => isoText(moment).slice(0, 13),
  daily: (moment) => isoText(moment).slice(0, 10),
  // The first of January 1970 was a Thursday.
  weekly: (moment) => String(Math.floor((moment / DAY_MS + 3) / 7)),
  monthly: (moment) => isoText(moment).slice(0, 7),
  yearly: (moment) => isoText(moment).slice(0, 4),
}
const RULES = Object.keys(PERIODS) as Rule[]

/** Sorts backups into those to keep, with why, and those to forget, in their order. Kind 'invalid-argument' for a policy that keeps nothing. */
export function retain(
  backups: readonly BackupInfo[],
  tags: ReadonlyMap<string, readonly string[]>,
  policy: Retention,
): RetentionOutcome {
  checkPolicy(policy)
  const reasons = new Map<string, string[]>(backups.map(({ id }) => [id, []]))
  for (const group of groupsOf(backups)) {
    for (const rule of RULES) keepBy(rule, policy[rule] ?? 0, group, reasons)
  }
  for (const { id } of backups) {
    for (const tag of tags.get(id) ?? []) if (policy.tags?.includes(tag)) reasons.get(id)?.push(`tag ${tag}`)
  }
  const kept = [...reasons].filter(([, why]) => why.length > 0).map(([id, why]) => ({ id, reasons: why }))
  return { kept, forgotten: [...reasons].filter(([, why]) => why.length === 0).map(([id]) => id) }
}

function checkPolicy(policy: Retention): void {
  for (const rule of RULES) {
    const count = policy[rule] ?? 0
    if (!Number.isSafeInteger(count) || count < 0) {
      throw new BlockError('invalid-argument', `keep-${rule} is a number of backups, not ${count}`)
    }
  }
  if (RULES.some((rule) => (policy[rule] ?? 0) > 0)) return
  const message = 'such a policy would forget every backup without a tag: say how many to keep, keep-last 1 at least'
  throw new BlockError('invalid-argument', message)
}

/** The backups of each machine and set of disks, newest first. */
function groupsOf(backups: readonly BackupInfo[]): Iterable<BackupInfo[]> {
  const groups = new Map<string, BackupInfo[]>()
  for (const info of backups) {
    const name = JSON.stringify([info.machine, ...info.disks.map((disk) => disk.name).sort()])
    groups.set(name, [info, ...(groups.get(name) ?? [])])
  }
  for (const group of groups.values()) group.sort((a, b) => b.moment - a.moment || (a.id < b.id ? 1 : -1))
  return groups.values()
}

function keepBy(rule: Rule, count: number, newestFirst: readonly BackupInfo[], reasons: Map<string, string[]>): void {
  const periods = new Set<string>()
  for (const { id, moment } of newestFirst) {
    if (periods.size >= count) return
    const period = PERIODS[rule](moment, id)
    if (periods.has(period)) continue
    periods.add(period)
    reasons.get(id)?.push(rule)
  }
}
