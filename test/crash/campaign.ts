// What the programs that run for long have in common: tasks are given to worker threads of the same file, one after another, until there is
// enough, and what was done so far is told when a Ctrl-C ends it before.

import { parentPort, Worker } from 'node:worker_threads'

export interface Campaign<Task, Report> {
  /** Worker threads. */
  readonly jobs: number
  /** The program's import.meta.url. */
  readonly program: string
  /** The next task; undefined when there is enough. */
  readonly next: () => Task | undefined
  readonly add: (report: Report) => void
  readonly summarise: () => void
}

/** In the main thread. */
export async function runCampaign<Task, Report>(campaign: Campaign<Task, Report>): Promise<void> {
  process.once('SIGINT', () => {
    campaign.summarise()
    process.exit(130)
  })
  await Promise.all(Array.from({ length: campaign.jobs }, () => work(campaign)))
  campaign.summarise()
}

/** In a worker thread: does each task that comes. */
export function performTasks<Task>(perform: (task: Task) => Promise<unknown>): void {
  parentPort?.on('message', (task: Task) => {
    void perform(task).then((report) => parentPort?.postMessage(report))
  })
}

async function work<Task, Report>({ program, next, add }: Campaign<Task, Report>): Promise<void> {
  const worker = new Worker(new URL(program))
  try {
    for (let task = next(); task !== undefined; task = next()) add(await ask<Report>(worker, task))
  } finally {
    await worker.terminate()
  }
}

function ask<Report>(worker: Worker, task: unknown): Promise<Report> {
  return new Promise((resolve, reject) => {
    worker.removeAllListeners()
    worker.once('message', resolve)
    worker.once('error', reject)
    worker.postMessage(task)
  })
}
