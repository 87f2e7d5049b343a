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

/** Follows a job to its end with a bar, and says why it waits where it does. Throws what the job failed with. */
export async function followJob(cli: Cli, started: JobReply): Promise<JobReply> {
  const { id } = started
  const progress = new Progress(id)
  const say = (message: string): void => void process.stderr.write(`varve: job ${id} ${message}\n`)
  const leave = (): void => {
    progress.end()
    say(`goes on without this command: varve job show ${id}, varve job cancel ${id}`)
    process.kill(process.pid, 'SIGINT')
  }
  let told: string | undefined
  process.once('SIGINT', leave)
  try {
    const ended = await cli.api.follow(id, ({ done, total, state, error }) => {
      progress.update(done, total)
      const reason = state === 'paused' ? error?.message : undefined
      if (reason !== undefined && reason !== told) say(`waits: ${reason}; then varve job resume ${id}`)
      told = reason
    })
    if (ended.error !== undefined) throw new BlockError(ended.error.kind as ErrorKind, ended.error.message)
    return ended
  } finally {
    process.off('SIGINT', leave)
    progress.end()
  }
}
