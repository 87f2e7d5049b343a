// Strikes at a migration: one of the daemons is killed, or the line between them is cut, at a moment of the copying or of the switch-over.
// Then whatever was struck is there again, and the one command that the status names ends what is left. All the while there must not
// be two that write, and afterwards the one that does has every write that the guest was told of.

import assert from 'node:assert/strict'
import { setTimeout as delay } from 'node:timers/promises'
import type { JobReply } from '../../src/api/schema.ts'
import type { Random } from '../../src/base/random.ts'
import { checkEqual, contentOf, type Pair } from './migration.ts'

export const STRIKES = ['source killed', 'target killed', 'line cut'] as const
export type Strike = (typeof STRIKES)[number]

/** Milliseconds after the begin of the copying, or of the switch-over. */
export interface Moment {
  readonly in: 'copying' | 'switch-over'
  readonly afterMs: number
}

export interface Struck {
  /** What the source said of the disk when all was there again: a state, and that of its job. */
  readonly found: string
  readonly outcome: 'finished by itself' | 'finished by --settle' | 'undone by --settle' | 'undone by itself'
  readonly pauseMs: number | undefined
  /** The longest that one write of the guest took, in milliseconds. */
  readonly longestMs: number
}

const isOver = ({ endedMs }: JobReply): boolean => endedMs !== undefined
const waits = ({ state, endedMs }: JobReply): boolean =>
  endedMs !== undefined || state === 'paused' || state === 'standby'

/** Migrates a new disk under a guest and strikes once. */
export async function strikeOnce(
  pair: Pair,
  disk: string,
  strike: Strike,
  moment: Moment,
  random: Random,
): Promise<Struck> {
  const guest = await pair.makeDisk(random.next(), disk)
  const watch = watchWriters(pair, disk)
  try {
    guest.start(1)
    const id = await pair.begin(disk, '--mode', 'write-blocking')
    if (moment.in === 'switch-over') await pair.job(id, (status) => status.state === 'ready' || waits(status))
    await delay(moment.afterMs)
    guest.takeLongest()
    await hit(pair, strike, random)
    const ended = await pair.job(id, waits)
    assert.ok(ended !== undefined, `${disk}: the job neither ends nor waits`)
    const found = `${(await pair.showAt(pair.source, disk))?.state}, job ${ended.state}`
    const settled = isOver(ended) ? ended : await settle(pair, disk, id)
    const longestMs = guest.takeLongest()
    await guest.pause()
    await guest.check(`${disk}, as the guest has it`)
    const [writer, ...others] = await pair.writers(disk)
    assert.ok(writer !== undefined && others.length === 0, `${disk}: one writes`)
    assert.equal(writer, settled.error === undefined ? 'target' : 'source', `${disk}: ${settled.error?.message}`)
    const site = writer === 'target' ? pair.target : pair.source
    checkEqual(await contentOf((await pair.showAt(site, disk))?.uri ?? ''), guest.content, `${disk} at the ${writer}`)
    const how = isOver(ended) ? 'by itself' : 'by --settle'
    const pauseMs = settled.details['pauseMs']
    return {
      found,
      outcome: `${settled.error === undefined ? 'finished' : 'undone'} ${how}`,
      pauseMs: typeof pauseMs === 'number' ? pauseMs : undefined,
      longestMs: Math.round(longestMs),
    }
  } finally {
    await guest.leave()
    assert.deepEqual(await watch(), [], `${disk}: never two writers`)
    await forget(pair, disk)
  }
}

async function hit(pair: Pair, strike: Strike, random: Random): Promise<void> {
  const awayMs = random.below(1500)
  if (strike === 'line cut') {
    pair.line.cut()
    await delay(awayMs)
    pair.line.mend()
    return
  }
  const { daemon } = strike === 'source killed' ? pair.source : pair.target
  await daemon.kill()
  await delay(awayMs)
  await daemon.start()
}

async function settle(pair: Pair, disk: string, id: string): Promise<JobReply> {
  await pair.source.done('migrate', disk, '--settle')
  const settled = await pair.job(id, waits)
  assert.ok(settled !== undefined && isOver(settled), `${disk}: one command ends it: ${JSON.stringify(settled)}`)
  return settled
}

/** Looks all the while who writes; returns how to end that, with the moments at which there were two. */
function watchWriters(pair: Pair, disk: string): () => Promise<readonly string[]> {
  const found: string[] = []
  let isOver = false
  const watching = (async () => {
    while (!isOver) {
      const writers = await pair.writers(disk)
      if (writers.length > 1) found.push(writers.join(' and '))
      await delay(20)
    }
  })()
  return async () => {
    isOver = true
    await watching
    return found
  }
}

async function forget(pair: Pair, disk: string): Promise<void> {
  await pair.source.varve('disk', 'remove', disk)
  await pair.target.varve('disk', 'remove', disk)
}
