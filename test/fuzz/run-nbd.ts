// Runs many trials of the NBD fuzz in this process, and reports what they ended with, how fast they were and what memory they took.
// A trial that breaks a rule is a failure: its seed is printed and replays it.
//
//   node test/fuzz/run-nbd.ts server|client [--count N] [--seed S]
//   node test/fuzz/run-nbd.ts server|client --only SEED

import { parseArgs } from 'node:util'
import { runClientTrial } from './nbd-client.ts'
import { runServerTrial } from './nbd-server.ts'

const SIDES = { server: runServerTrial, client: runClientTrial } as const

/** Trials between two lines of progress. */
const STEP = 250_000

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    count: { type: 'string', default: '100000' },
    seed: { type: 'string', default: '1' },
    only: { type: 'string' },
  },
})

function memory(): string {
  const { heapUsed, arrayBuffers } = process.memoryUsage()
  const mib = (bytes: number): number => Math.round(bytes / 1024 / 1024)
  return `heap ${mib(heapUsed)} MiB, buffers ${mib(arrayBuffers)} MiB, peak ${Math.round(process.resourceUsage().maxRSS / 1024)} MiB`
}

async function runMany(side: keyof typeof SIDES, first: number, count: number): Promise<number> {
  // An error that the protocol answers needs no trace of its calls, and most of the time would go there.
  Error.stackTraceLimit = 0
  const outcomes = new Map<string, number>()
  let failures = 0
  const began = performance.now()
  for (let done = 1; done <= count; done++) {
    try {
      const { outcome } = await SIDES[side](first + done - 1)
      outcomes.set(outcome, (outcomes.get(outcome) ?? 0) + 1)
    } catch (error) {
      failures++
      console.log(`seed ${first + done - 1}: ${String(error)}`)
    }
    if (done % STEP === 0) console.log(`${done} conversations; ${memory()}`)
  }
  const seconds = (performance.now() - began) / 1000
  const cpu = process.cpuUsage().user / 1e6
  console.log(
    `${count} conversations from seed ${first} in ${seconds.toFixed(1)} s (${cpu.toFixed(1)} s of a core); ${memory()}`,
  )
  for (const [outcome, number] of [...outcomes].sort((a, b) => b[1] - a[1])) console.log(`${number} ${outcome}`)
  console.log(`${failures} failures`)
  return failures
}

const side = positionals[0] === 'client' ? 'client' : 'server'
if (values.only !== undefined) console.log(await SIDES[side](Number(values.only)))
else if ((await runMany(side, Number(values.seed), Number(values.count))) > 0) process.exitCode = 1
