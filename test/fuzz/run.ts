// Runs many trials of the qcow2 fuzz in two processes, and reports what they ended with. A trial that breaks a rule, or a process
// that stops answering, is a failure: its seed is printed and replays it.
//
//   node test/fuzz/run.ts [--count N] [--seed S] [--jobs N]
//   node test/fuzz/run.ts --only SEED                          one trial, in this process

import { fork } from 'node:child_process'
import { parseArgs } from 'node:util'
import { makeBases } from './qcow2-bases.ts'
import { runTrial, type TrialResult } from './qcow2.ts'

/** Seeds that a process takes at a time, and how long that may take, in milliseconds. */
const BATCH = 100
const BATCH_MS = 120_000

interface Work {
  readonly first: number
  readonly count: number
}

interface Done {
  readonly outcomes: Readonly<Record<string, number>>
  readonly failures: readonly { readonly seed: number; readonly error: string }[]
  readonly peakMiB: number
}

async function child(): Promise<void> {
  const bases = await makeBases()
  process.on('message', (work: Work) => {
    void runBatch(work).then((done) => process.send?.(done))
  })
  process.send?.('ready')

  async function runBatch({ first, count }: Work): Promise<Done> {
    const outcomes: Record<string, number> = {}
    const failures: { seed: number; error: string }[] = []
    for (let seed = first; seed < first + count; seed++) {
      try {
        const result = await runTrial(bases, seed)
        const key = describe(result)
        outcomes[key] = (outcomes[key] ?? 0) + 1
      } catch (error) {
        failures.push({ seed, error: error instanceof Error ? (error.stack ?? error.message) : String(error) })
      }
    }
    return { outcomes, failures, peakMiB: Math.round(process.resourceUsage().maxRSS / 1024) }
  }
}

function describe({ outcome, repaired }: TrialResult): string {
  return `${outcome}; after a repair: ${repaired}`
}

class Report {
  readonly outcomes = new Map<string, number>()
  readonly failures: { readonly seed: number; readonly error: string }[] = []
  peakMiB = 0
  trials = 0

  add({ outcomes, failures, peakMiB }: Done): void {
    for (const [key, count] of Object.entries(outcomes)) {
      this.outcomes.set(key, (this.outcomes.get(key) ?? 0) + count)
      this.trials += count
    }
    this.trials += failures.length
    this.failures.push(...failures)
    for (const { seed, error } of failures) console.log(`seed ${seed}: ${error}`)
    this.peakMiB = Math.max(this.peakMiB, peakMiB)
  }

  print(seconds: number): void {
    console.log(`${this.trials} images in ${Math.round(seconds)} s, peak memory of a process ${this.peakMiB} MiB`)
    for (const [key, count] of [...this.outcomes].sort((a, b) => b[1] - a[1])) console.log(`${count} ${key}`)
    console.log(`${this.failures.length} failures`)
  }
}

/** Keeps one process busy until no work is left. */
function runJob(next: () => Work | undefined, report: Report): Promise<void> {
  return new Promise((resolve, reject) => {
    const worker = fork(import.meta.filename, ['--child'])
    let current: Work | undefined
    let timer: NodeJS.Timeout | undefined
    const go = (): void => {
      clearTimeout(timer)
      current = next()
      if (current === undefined) {
        worker.disconnect()
        resolve()
        return
      }
      timer = setTimeout(() => worker.kill('SIGKILL'), BATCH_MS)
      worker.send(current)
    }
    worker.on('message', (message: Done | 'ready') => {
      if (message !== 'ready') report.add(message)
      go()
    })
    worker.on('exit', (code, signal) => {
      clearTimeout(timer)
      if (current !== undefined)
        reject(
          new Error(
            `a process ended (${code ?? signal}) in seeds ${current.first} to ${current.first + current.count - 1}`,
          ),
        )
    })
  })
}

async function main(): Promise<void> {
  const { values } = parseArgs({
    options: {
      count: { type: 'string', default: '200000' },
      seed: { type: 'string', default: '1' },
      jobs: { type: 'string', default: '2' },
      only: { type: 'string' },
      child: { type: 'boolean', default: false },
    },
  })
  if (values.child) return child()
  if (values.only !== undefined) {
    console.log(await runTrial(await makeBases(), Number(values.only)))
    return
  }
  const end = Number(values.seed) + Number(values.count)
  let at = Number(values.seed)
  const next = (): Work | undefined => {
    if (at >= end) return undefined
    const work = { first: at, count: Math.min(BATCH, end - at) }
    at += work.count
    return work
  }
  const report = new Report()
  const started = performance.now()
  const timer = setInterval(
    () => console.log(`${report.trials} of ${values.count}, ${report.failures.length} failures`),
    60_000,
  )
  await Promise.all(Array.from({ length: Number(values.jobs) }, () => runJob(next, report)))
  clearInterval(timer)
  report.print((performance.now() - started) / 1000)
  process.exitCode = report.failures.length === 0 ? 0 : 1
}

await main()
