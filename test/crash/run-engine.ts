// Crashes of the whole engine in any number: each life is a seed; at every change of what is stored a crash is set aside, opened and
// looked at. Lives are numbered from --seed on, so that a long campaign is done in parts.
//
//   node test/crash/run-engine.ts --points 100000 --jobs 2 --seed 1     from life 1 on, until there were so many
//   node test/crash/run-engine.ts --replay 17,2310                      one crash, at operation 2310 of life 17

import { parseArgs } from 'node:util'
import { isMainThread } from 'node:worker_threads'
import { performTasks, runCampaign } from './campaign.ts'
import { checkCrash, NOTHING_SEEN, type Seen } from './engine-crash.ts'
import { type Crash, liveAndCrash, type Loss } from './engine-life.ts'

/** Guest requests of a life. */
const STEPS = 120
/** One crash in so many has its backups looked at, too, which takes longest; unless told. */
const BACKUP_EVERY = 10

interface Finding {
  readonly replay: string
  readonly message: string
}

/** What came of one life. */
interface Report {
  readonly seed: number
  readonly points: number
  /** By what was lost and what was under way. */
  readonly counts: ReadonlyMap<string, number>
  readonly seen: Seen
  readonly findings: readonly Finding[]
}

async function perform(seed: number, only?: number): Promise<Report> {
  const counts = new Map<string, number>()
  const seen: Seen = { ...NOTHING_SEEN }
  const findings: Finding[] = []
  let crashes: Crash[] = []
  try {
    crashes = await liveAndCrash({ seed, steps: STEPS, every: 1 })
  } catch (error) {
    findings.push({ replay: `${seed},0`, message: textOf(error) })
  }
  let points = 0
  // Each is let go when it was looked at: a life's crashes are many, and the last one holds as much as all.
  for (let crash = crashes.shift(); crash !== undefined; crash = crashes.shift()) {
    if (only !== undefined && crash.operation !== only) continue
    const { loss, operation, during } = crash
    points++
    for (const name of [loss, ...(during.length === 0 ? ['no command'] : during)])
      counts.set(name, (counts.get(name) ?? 0) + 1)
    try {
      const found = await checkCrash(crash, `${loss} at operation ${operation}`, operation % BACKUP_EVERY === 0)
      for (const key of Object.keys(seen) as (keyof Seen)[]) seen[key] += found[key]
    } catch (error) {
      findings.push({ replay: `${seed},${operation}`, message: `${during.join(' and ')}: ${textOf(error)}` })
    }
  }
  return { seed, points, counts, seen, findings }
}

function textOf(error: unknown): string {
  return error instanceof Error ? (error.stack ?? error.message) : String(error)
}

interface Options {
  readonly points: number
  readonly jobs: number
  readonly seed: number
}

class Campaign {
  readonly #options: Options
  readonly #started = performance.now()
  readonly #counts = new Map<string, number>()
  readonly #seen: Seen = { ...NOTHING_SEEN }
  #next: number
  #lives = 0
  #points = 0
  #findings = 0

  constructor(options: Options) {
    this.#options = options
    this.#next = options.seed
  }

  /** True when nothing was wrong. */
  async go(): Promise<boolean> {
    await runCampaign<number, Report>({
      jobs: this.#options.jobs,
      program: import.meta.url,
      next: () => (this.#points < this.#options.points ? this.#next++ : undefined),
      add: (report) => this.#add(report),
      summarise: () => this.#summarise(),
    })
    return this.#findings === 0
  }

  #add({ seed, points, counts, seen, findings }: Report): void {
    this.#lives++
    this.#points += points
    this.#findings += findings.length
    for (const [name, count] of counts) this.#counts.set(name, (this.#counts.get(name) ?? 0) + count)
    for (const key of Object.keys(seen) as (keyof Seen)[]) this.#seen[key] += seen[key]
    for (const { replay, message } of findings) console.log(`WRONG: --replay ${replay}\n${message}`)
    const rate = this.#points / this.#seconds
    console.log(`life ${seed}: ${points} crashes; ${this.#points} so far, ${rate.toFixed(0)} a second`)
  }

  get #seconds(): number {
    return (performance.now() - this.#started) / 1000
  }

  #summarise(): void {
    const { seed, jobs } = this.#options
    const losses: readonly Loss[] = ['kill', 'all unsynced', 'some unsynced']
    const lost = losses.map((loss) => `${loss} ${this.#counts.get(loss) ?? 0}`).join(', ')
    console.log(`\n${this.#points} crashes (${lost}) in lives ${seed} to ${seed + this.#lives - 1}`)
    const under = [...this.#counts].filter(([name]) => !(losses as readonly string[]).includes(name))
    console.log(
      `under way: ${under
        .map(([name, count]) => `${name} ${count}`)
        .sort((a, b) => a.localeCompare(b))
        .join(', ')}`,
    )
    const { snapshots, clones, bitmaps, jobs: resumed } = this.#seen
    console.log(`looked at ${snapshots} snapshots, ${clones} clones, ${bitmaps} bitmaps; ${resumed} jobs went on`)
    console.log(`${Math.round(this.#seconds)} s in ${jobs} threads; ${this.#findings} crashes went wrong`)
  }
}

async function replay(words: string): Promise<boolean> {
  const [seed = 0, operation = 0] = words.split(',').map(Number)
  const { points, findings } = await perform(seed, operation)
  if (points === 0) console.log('there is no such crash')
  for (const { message } of findings) console.log(message)
  if (points > 0 && findings.length === 0) console.log('nothing is wrong')
  return findings.length === 0
}

if (!isMainThread) {
  performTasks(perform)
} else {
  const { values } = parseArgs({
    options: {
      points: { type: 'string', default: '1000' },
      jobs: { type: 'string', default: '1' },
      seed: { type: 'string', default: '1' },
      replay: { type: 'string' },
    },
  })
  const { points, jobs, seed } = values
  const isGood =
    values.replay === undefined
      ? await new Campaign({ points: Number(points), jobs: Number(jobs), seed: Number(seed) }).go()
      : await replay(values.replay)
  process.exitCode = isGood ? 0 : 1
}
