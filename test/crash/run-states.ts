// Crash states of qcow2 images in any number: each run is a setting, a seed and its random operations; its states are judged at
// every change. Runs are numbered from --seed on, so that a long campaign is done in parts.
//
//   node test/crash/run-states.ts --states 1000000 --jobs 2 --seed 1     from run 1 on, until there are so many
//   node test/crash/run-states.ts --setting 512+late+keeps --states 50000 --qemu 2000     with QEMU looking at one in 2000
//   node test/crash/run-states.ts --replay 512+late,17,5000,2310,3       one state, with its story

import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { parseArgs } from 'node:util'
import { isMainThread } from 'node:worker_threads'
import { performTasks, runCampaign } from './campaign.ts'
import { QemuPeer } from './qcow2-qemu.ts'
import { record } from './qcow2-run.ts'
import { SETTINGS, settingNamed } from './qcow2-settings.ts'
import { type Counts, type Finding, judge, type Look, MANNERS, NO_STATES, sumOf, type Verdict } from './qcow2-states.ts'

/** What a worker is asked to do. */
interface Task {
  readonly setting: string
  readonly seed: number
  readonly operations: number
  readonly draws: number
  readonly most: number
  /** QEMU is shown one state in so many; none for 0. */
  readonly qemu: number
}

interface Report {
  readonly task: Task
  readonly counts: Counts
  readonly boundaries: number
  readonly findings: readonly Finding[]
  readonly seconds: number
  /** How often QEMU looked at a state. */
  readonly looks: number
  /** Of these states, those that only Varve can repair. */
  readonly lost: number
}

/** Of one state in so many, the repair too is cut short by crashes. */
const AGAIN = 200

async function perform(task: Task): Promise<Report> {
  const started = performance.now()
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'varve-states-'))
  try {
    const peer = new QemuPeer(folder, settingNamed(task.setting))
    const verdict = await runOf(task, peer)
    return { task, ...verdict, seconds: (performance.now() - started) / 1000, looks: peer.seen, lost: peer.lost }
  } finally {
    fs.rmSync(folder, { recursive: true })
  }
}

async function runOf(task: Task, peer: QemuPeer): Promise<Verdict> {
  const { setting, seed, operations, draws, most, qemu } = task
  const look: Look = (state, content, when) => {
    if (qemu > 0 && (state.boundary * 31 + state.index) % qemu === 0) peer.look(state, content, when)
  }
  try {
    return await judge(await record(settingNamed(setting), seed, operations), { draws, most, look, again: AGAIN })
  } catch (error) {
    // The run itself went wrong: an operation failed, or an image could not be opened again.
    const message = error instanceof Error ? (error.stack ?? error.message) : String(error)
    const finding: Finding = { setting, seed, operations, boundary: -1, index: 0, manner: 'kill', message }
    return { counts: NO_STATES, boundaries: 0, findings: [finding] }
  }
}

interface Total {
  states: number
  boundaries: number
  runs: number
  findings: number
  seconds: number
}

class Campaign {
  readonly #totals = new Map<string, Total>()
  readonly #counts: Counts = { ...NO_STATES }
  readonly #started = performance.now()
  readonly #options: Options
  #run: number
  #states = 0
  #findings = 0
  #looks = 0
  #lost = 0

  constructor(options: Options) {
    this.#options = options
    this.#run = options.seed
  }

  async go(): Promise<boolean> {
    await runCampaign<Task, Report>({
      jobs: this.#options.jobs,
      program: import.meta.url,
      next: () => (this.#states < this.#options.states ? this.#nextTask() : undefined),
      add: (report) => this.#add(report),
      // The run that the next part begins with is in it.
      summarise: () => this.#summarise(),
    })
    return this.#findings === 0
  }

  #nextTask(): Task {
    const { setting, operations, draws, states, qemu } = this.#options
    const seed = this.#run++
    // A stride, so that a campaign that is cut short has seen all shapes.
    const name = setting ?? (SETTINGS[(seed * 17) % SETTINGS.length] as { name: string }).name
    return { setting: name, seed, operations, draws, most: states - this.#states, qemu }
  }

  #add({ task, counts, boundaries, findings, seconds, looks, lost }: Report): void {
    const total = this.#totals.get(task.setting) ?? { states: 0, boundaries: 0, runs: 0, findings: 0, seconds: 0 }
    this.#totals.set(task.setting, total)
    const states = sumOf(counts)
    total.states += states
    total.boundaries += boundaries
    total.runs++
    total.findings += findings.length
    total.seconds += seconds
    for (const manner of MANNERS) this.#counts[manner] += counts[manner]
    this.#states += states
    this.#looks += looks
    this.#lost += lost
    this.#findings += findings.length
    for (const finding of findings) {
      const { setting, seed, operations, boundary, index, manner, message } = finding
      console.log(`WRONG after ${manner}: --replay ${setting},${seed},${operations},${boundary},${index}\n${message}`)
    }
    const rate = Math.round(this.#states / this.#seconds)
    console.log(`run ${task.seed} (${task.setting}): ${states} states; ${this.#states} so far, ${rate} a second`)
  }

  get #seconds(): number {
    return (performance.now() - this.#started) / 1000
  }

  #summarise(): void {
    console.log(
      '\n| setting | runs | crashes at | states | states a second and thread | wrong |\n|---|---|---|---|---|---|',
    )
    for (const [name, { runs, boundaries, states, seconds, findings }] of this.#totals)
      console.log(`| ${name} | ${runs} | ${boundaries} | ${states} | ${Math.round(states / seconds)} | ${findings} |`)
    const manners = MANNERS.map((manner) => `${manner} ${this.#counts[manner]}`).join(', ')
    const { seed, operations, jobs } = this.#options
    console.log(`\n${this.#states} states (${manners})`)
    console.log(
      `runs ${seed} to ${this.#run - 1} of ${operations} operations, ${jobs} threads, ${Math.round(this.#seconds)} s`,
    )
    console.log(`QEMU looked ${this.#looks} times, ${this.#lost} times at what only Varve repairs`)
    console.log(`${this.#findings} states were wrong`)
  }
}

/** Judges one state and tells all about it. */
async function replay(words: string): Promise<boolean> {
  const [name = '', ...numbers] = words.split(',')
  const [seed = 0, operations = 0, boundary = 0, index = 0] = numbers.map(Number)
  const recording = await record(settingNamed(name), seed, operations)
  const tell = (lines: readonly string[]): void => lines.forEach((line) => console.log(line))
  const { counts, findings } = await judge(recording, { draws: index, only: { boundary, index }, tell, again: 1 })
  console.log(sumOf(counts) === 0 ? 'there is no such state' : (findings[0]?.message ?? 'nothing is wrong'))
  return findings.length === 0
}

interface Options {
  readonly states: number
  readonly jobs: number
  readonly seed: number
  readonly operations: number
  readonly draws: number
  readonly qemu: number
  readonly setting: string | undefined
}

const { values } = parseArgs({
  options: {
    states: { type: 'string', default: '10000' },
    jobs: { type: 'string', default: '1' },
    seed: { type: 'string', default: '1' },
    operations: { type: 'string', default: '5000' },
    draws: { type: 'string', default: '2' },
    qemu: { type: 'string', default: '0' },
    setting: { type: 'string' },
    replay: { type: 'string' },
  },
})

if (!isMainThread) {
  performTasks(perform)
} else {
  const isGood =
    values.replay === undefined
      ? await new Campaign({
          states: Number(values.states),
          jobs: Number(values.jobs),
          seed: Number(values.seed),
          operations: Number(values.operations),
          draws: Number(values.draws),
          qemu: Number(values.qemu),
          setting: values.setting,
        }).go()
      : await replay(values.replay)
  process.exitCode = isGood ? 0 : 1
}
