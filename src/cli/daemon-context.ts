// What the commands share that ask a daemon: its client, and how a job is followed.

import type { Command } from 'commander'
import { ApiClient } from '../api/client.ts'
import type { JobReply } from '../api/schema.ts'
import { BlockError, type ErrorKind } from '../block/error.ts'
import { homeAt, homeFolder } from '../engine/home.ts'
import { type GlobalOptions } from './context.ts'
import { Progress } from './progress.ts'

export interface Cli {
  readonly json: boolean
  readonly home: string
  readonly api: ApiClient
}

/** The shared things for a command's action. */
export function cliOf(command: Command): Cli {
  const { json, home } = command.optsWithGlobals<GlobalOptions>()
  const folder = homeFolder(home)
  return { json: json === true, home: folder, api: new ApiClient(homeAt(folder).apiSocket) }
}

/** The options that were said. */
export function given<T extends Record<string, string | undefined>>(options: T): { [K in keyof T]?: string } {
  const said = Object.entries(options).filter(([, value]) => value !== undefined)
  return Object.fromEntries(said) as { [K in keyof T]?: string }
}

/**
 * Follows the job that was asked for to its end with a bar, and says why it waits where it does; with `wait` false it is
 * only begun. Throws what the job failed with. A Ctrl-C leaves the job running and says so, also when it comes between the
 * request and the daemon's answer; a second one ends the command at once. With `isOver`, a job that is so far is left there.
 */
export async function followJob(
  cli: Cli,
  asked: Promise<JobReply>,
  { wait, isOver }: { readonly wait: boolean; readonly isOver?: (status: JobReply) => boolean },
): Promise<JobReply> {
  if (!wait) return await asked
  const left = Promise.withResolvers<void>()
  process.once('SIGINT', left.resolve)
  try {
    const { id } = await asked
    const say = (message: string): void => void process.stderr.write(`varve: job ${id} ${message}\n`)
    const progress = new Progress(id)
    void left.promise.then(() => {
      progress.end()
      say(`goes on without this command: varve job show ${id}, varve job cancel ${id}`)
      process.kill(process.pid, 'SIGINT')
    })
    try {
      return await toTheEnd(cli, id, { progress, say, isOver })
    } finally {
      progress.end()
    }
  } finally {
    process.off('SIGINT', left.resolve)
  }
}

interface Following {
  readonly progress: Progress
  readonly say: (message: string) => void
  readonly isOver: ((status: JobReply) => boolean) | undefined
}

async function toTheEnd(cli: Cli, id: string, { progress, say, isOver }: Following): Promise<JobReply> {
  let told: string | undefined
  const show = ({ done, total, state, error }: JobReply): void => {
    progress.update(done, total)
    const reason = state === 'paused' || state === 'standby' ? error?.message : undefined
    const wait =
      state === 'pending'
        ? `is done but its effect: varve job finalize ${id}, or varve job cancel ${id}`
        : reason && `waits: ${reason}; then varve job resume ${id}`
    if (wait !== undefined && wait !== told) say(wait)
    told = wait
  }
  const ended = await cli.api.follow(id, show, isOver)
  if (ended.error !== undefined) throw new BlockError(ended.error.kind as ErrorKind, ended.error.message)
  return ended
}
