// varve job: list, show, pause, resume, cancel, set-speed.

import type { Command } from 'commander'
import type { JobReply } from '../api/schema.ts'
import { formatSize } from '../base/size.ts'
import { print, sizeArgument, table } from './context.ts'
import { cliOf } from './daemon-context.ts'

const HEADS = ['JOB', 'SUBJECT', 'STATE', 'DONE', 'OF', 'RESUMED AT', 'ERROR']

export function addJobCommands(program: Command): void {
  const job = program.command('job').description('long work: merges and backups')
  job
    .command('list')
    .description('running jobs, then ended ones, newest first')
    .action(async (_options: unknown, command: Command) => {
      const cli = cliOf(command)
      const jobs = await cli.api.call('listJobs', {}, {})
      print(cli, jobs, () => table(HEADS, jobs.map(row)))
    })
  job
    .command('show <job>')
    .description('one job')
    .action(async (id: string, _options: unknown, command: Command) => {
      const cli = cliOf(command)
      print(cli, await cli.api.call('showJob', { job: id }, {}), (status) => table(HEADS, [row(status)]))
    })
  for (const verb of ['pause', 'resume', 'cancel'] as const) {
    job
      .command(`${verb} <job>`)
      .description(`${verb} a job`)
      .action(async (id: string, _options: unknown, command: Command) => {
        const cli = cliOf(command)
        print(cli, await cli.api.call('sayToJob', { job: id, verb }, {}), (status) => `${status.id}: ${status.state}`)
      })
  }
  job
    .command('set-speed <job> <rate>')
    .description('change the speed limit, in bytes per second; 0 is no limit')
    .action(async (id: string, rate: string, _options: unknown, command: Command) => {
      const cli = cliOf(command)
      const status = await cli.api.call('setJobSpeed', { job: id }, { speed: sizeArgument(rate) })
      print(cli, status, () => `${status.id}: ${formatSize(status.speed)}/s`)
    })
}

function row(job: JobReply): string[] {
  const resumed = job.resumedAt > 0 ? formatSize(job.resumedAt) : ''
  return [
    job.id,
    job.subject,
    job.state,
    formatSize(job.done),
    formatSize(job.total),
    resumed,
    job.error?.message ?? '',
  ]
}
