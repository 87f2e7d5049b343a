// varve host: what backups of this host may take: show, set.

import type { Command } from 'commander'
import { Option } from 'commander'
import type { BodyInput } from '../api/schema.ts'
import type { HostReply } from '../api/host-routes.ts'
import { formatSize } from '../base/size.ts'
import { BlockError } from '../block/error.ts'
import { print, sizeArgument } from './context.ts'
import { cliOf } from './daemon-context.ts'

/** What takes a limit back to how the daemon was started. */
const DEFAULT = 'default'
type Limit = number | typeof DEFAULT

interface SetOptions {
  readonly machines?: Limit
  readonly scratch?: Limit
  readonly scratchHost?: Limit
  readonly scratchMemory?: Limit
  readonly bandwidth?: Limit
  readonly window?: readonly string[]
  readonly windowEnd?: 'finish' | 'break'
}

export function addHostCommands(program: Command): void {
  const host = program.command('host').description('what backups of this host may take, and when they begin')
  host
    .command('show')
    .description('the limits, and what is so now')
    .action(async (_options: unknown, command: Command) => {
      const cli = cliOf(command)
      print(cli, await cli.api.call('showHost', {}, {}), describe)
    })
  host
    .command('set')
    .description(`change limits, at once and for later; the word ${DEFAULT} is as the daemon was started`)
    .option('--machines <number>', 'machines that are backed up at a time', orDefault(countArgument))
    .option('--scratch <size>', 'copy space of one disk', orDefault(sizeArgument))
    .option('--scratch-host <size>', 'copy space of all disks together', orDefault(sizeArgument))
    .option('--scratch-memory <size>', 'how much of that is memory at most', orDefault(sizeArgument))
    .option('--bandwidth <rate>', 'bytes per second of all backups together; 0 is no limit', orDefault(sizeArgument))
    .option('--window <from-to...>', 'when queued backups begin, such as 22:00-06:00, in local time; any: at any time')
    .addOption(
      new Option('--window-end <what>', 'queued backups that run when their window closes').choices([
        'finish',
        'break',
      ]),
    )
    .action(set)
}

async function set(options: SetOptions, command: Command): Promise<void> {
  const { machines, scratch, scratchHost, scratchMemory, bandwidth, window, windowEnd } = options
  const change: BodyInput<'setHost'> = {
    ...(machines === undefined ? {} : { machines: said(machines) }),
    ...(scratch === undefined ? {} : { scratchBytes: said(scratch) }),
    ...(scratchHost === undefined ? {} : { scratchHostBytes: said(scratchHost) }),
    ...(scratchMemory === undefined ? {} : { scratchMemoryBytes: said(scratchMemory) }),
    ...(bandwidth === undefined ? {} : { bandwidth: said(bandwidth) }),
    ...(window === undefined ? {} : { windows: window.includes('any') ? null : [...window] }),
    ...(windowEnd === undefined ? {} : { windowEnd }),
  }
  if (Object.keys(change).length === 0)
    throw new BlockError('invalid-argument', 'say which limit: varve host set --help lists them')
  const cli = cliOf(command)
  print(cli, await cli.api.call('setHost', {}, change), describe)
}

function describe(host: HostReply): string {
  const { machines, bandwidth, windows, windowEnd, scratch, running, waiting } = host
  const [disk, all, memory] = [host.scratchBytes, host.scratchHostBytes, host.scratchMemoryBytes].map(formatSize)
  const kept = windowEnd === 'break' ? '; what runs when it closes is broken off' : ''
  return [
    `machines at a time: ${machines}`,
    `scratch: ${disk} a disk, ${all} in all, of that ${memory} in memory; ${formatSize(scratch.used)} in use, ${formatSize(scratch.peak)} at most so far; ${formatSize(scratch.memory)} of memory taken`,
    `bandwidth: ${bandwidth === 0 ? 'no limit' : `${formatSize(bandwidth)} a second`}`,
    `window: ${windows.length === 0 ? 'at any time' : `${windows.join(', ')}${kept}`}`,
    `running: ${running.map(({ job, machine }) => `${machine} (${job})`).join(', ') || 'nothing'}; waiting: ${waiting}`,
  ].join('\n')
}

function orDefault(parse: (text: string) => number): (text: string) => Limit {
  return (text) => (text === DEFAULT ? DEFAULT : parse(text))
}

/** What the API takes for it. */
function said(limit: Limit): number | null {
  return limit === DEFAULT ? null : limit
}

/** Kind 'invalid-argument' when it is none. */
function countArgument(text: string): number {
  const count = /^\d{1,4}$/.test(text) ? Number(text) : 0
  if (count > 0) return count
  throw new BlockError('invalid-argument', `${JSON.stringify(text)} is no number of machines: write 1 or more`)
}
