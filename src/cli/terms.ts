// The options of every command that begins a job: how the job is run. Which of them a kind of job can have is a table of the job room;
// the daemon refuses the others in its own words.

import { type Command, Option } from 'commander'
import { BlockError } from '../block/error.ts'
import { ERROR_POLICIES, type ErrorPolicy, type How, HOWS, type JobKind, TERMS } from '../job/terms.ts'
import { sizeArgument } from './context.ts'

export interface TermOptions {
  readonly speed: number
  readonly onError?: ErrorPolicy
  readonly finalize?: How
  readonly dismiss?: How
  readonly guestLatency?: number
}

/** Adds them to a command that begins a job of that kind. */
export function addTermOptions(command: Command, kind: JobKind): Command {
  const policies = `on errors of the storage (${TERMS[kind].onError.join(', ')}): end, wait, wait for room, or try again`
  return command
    .option('--speed <rate>', 'bytes per second', sizeArgument, 0)
    .addOption(new Option('--on-error <policy>', policies).choices(ERROR_POLICIES))
    .addOption(new Option('--finalize <how>', 'manual: the result waits for varve job finalize').choices(HOWS))
    .addOption(new Option('--dismiss <how>', 'manual: the ended job is listed until varve job dismiss').choices(HOWS))
    .option('--guest-latency <ms>', 'what a request of the guest may take on average; found out unless told', latency)
}

/** What of the options a request has. */
export function termsOf(options: TermOptions): Partial<TermOptions> {
  const { speed, onError, finalize, dismiss, guestLatency } = options
  return {
    speed,
    ...(onError === undefined ? {} : { onError }),
    ...(finalize === undefined ? {} : { finalize }),
    ...(dismiss === undefined ? {} : { dismiss }),
    ...(guestLatency === undefined ? {} : { guestLatency }),
  }
}

function latency(text: string): number {
  const value = Number(text)
  if (text.trim() !== '' && Number.isFinite(value) && value >= 0) return value
  throw new BlockError('invalid-argument', `${JSON.stringify(text)} is no latency: milliseconds, or 0 not to look`)
}
