// How a job is run, whatever its work is: how fast, what an error means to it, and what waits for the user. One table says what each
// kind of job can be told, and the door refuses the rest. What comes of an error is a table too; the waiting is mend.ts.

import { BlockError } from '../block/error.ts'

/** What QEMU itself does with a disk of a machine of its own, at our bidding. */
export const VM_JOB_KINDS = ['vm-commit', 'vm-stream', 'vm-mirror'] as const
export type VmJobKind = (typeof VM_JOB_KINDS)[number]
export const JOB_KINDS = [
  ...(['commit', 'stream', 'mirror', 'migrate', 'backup', 'view', 'restore', 'overwrite'] as const),
  ...VM_JOB_KINDS,
] as const
export type JobKind = (typeof JOB_KINDS)[number]

/**
 * What an error of the source or the target means to a job: `report` ends it, and all is as before; `stop` pauses it until it is
 * resumed or cancelled; `enospc` does that when the target is full, and else ends it; `ignore` tries again by itself, as long as it
 * takes. None skips anything.
 */
export const ERROR_POLICIES = ['report', 'ignore', 'stop', 'enospc'] as const
export type ErrorPolicy = (typeof ERROR_POLICIES)[number]

/** Whether something happens by itself or when the user says so. */
export const HOWS = ['auto', 'manual'] as const
export type How = (typeof HOWS)[number]

/** Each is as the kind of the job has it unless told. */
export interface JobTerms {
  /** Bytes per second; 0, the default, is no limit. */
  readonly speed?: number | undefined
  readonly onError?: ErrorPolicy | undefined
  /** By hand, a job whose result is ready to take effect waits in `pending` until `finalize` is said; 'auto' unless told. */
  readonly finalize?: How | undefined
  /** By hand, a job that ended stays in the list until it is dismissed; by itself, 'auto', only one that failed does. */
  readonly dismiss?: How | undefined
  /** Milliseconds that a guest's request takes at most, on the average, while the job copies; 0 does not look. Found out unless told. */
  readonly guestLatency?: number | undefined
}

/** What each kind of job may be told: its policies on errors, the default first, and whether it can be finalized by hand. */
export const TERMS = {
  commit: { onError: ['enospc', 'report', 'stop'], finalize: ['auto', 'manual'] },
  stream: { onError: ['enospc', 'report', 'stop'], finalize: ['auto', 'manual'] },
  mirror: { onError: ['stop', 'enospc', 'report', 'ignore'], finalize: ['auto'] },
  migrate: { onError: ['stop', 'report', 'ignore'], finalize: ['auto'] },
  backup: { onError: ['enospc', 'report', 'stop', 'ignore'], finalize: ['auto', 'manual'] },
  view: { onError: ['report'], finalize: ['manual'] },
  restore: { onError: ['ignore', 'stop', 'report', 'enospc'], finalize: ['auto', 'manual'] },
  overwrite: { onError: ['stop', 'ignore', 'report', 'enospc'], finalize: ['auto', 'manual'] },
  'vm-commit': { onError: ['report'], finalize: ['auto'] },
  'vm-stream': { onError: ['report'], finalize: ['auto'] },
  'vm-mirror': { onError: ['report'], finalize: ['auto'] },
} as const satisfies Record<JobKind, { readonly onError: readonly ErrorPolicy[]; readonly finalize: readonly How[] }>

/** What is said of a policy that a kind of job does not have. */
const NO_POLICY: Record<ErrorPolicy, string> = {
  ignore:
    'it takes effect only when all of it is copied, so there is nothing that it could pass over; stop waits for you',
  report: 'it waits for you on every error',
  stop: 'it ends on every error',
  enospc: 'a full target is an error like any other to it',
}

/** Kind 'invalid-argument' when a job of that kind cannot be run like that. */
export function checkTerms(kind: JobKind, { speed = 0, onError, finalize, guestLatency = 0 }: JobTerms): void {
  const refuse = (message: string): BlockError => new BlockError('invalid-argument', message)
  const known = TERMS[kind]
  if (!Number.isSafeInteger(speed) || speed < 0) throw refuse(`${speed} is no speed: bytes a second, or 0 for no limit`)
  if (!Number.isFinite(guestLatency) || guestLatency < 0)
    throw refuse(`${guestLatency} is no latency: milliseconds, or 0 not to look at the guest`)
  if (onError !== undefined && !(known.onError as readonly ErrorPolicy[]).includes(onError)) {
    const choices = known.onError.join(', ')
    throw refuse(`a ${kind} has no --on-error ${onError}: ${NO_POLICY[onError]}; it can be told ${choices}`)
  }
  if (finalize !== undefined && !(known.finalize as readonly How[]).includes(finalize))
    throw refuse(`a ${kind} is not finalized by hand: one that is ready waits for varve job complete by itself`)
}

/** What a job does about an error: it ends, waits until it is resumed, or tries again by itself. */
export type Reaction = 'end' | 'wait' | 'again'

const REACTIONS: Record<ErrorPolicy, { readonly full: Reaction; readonly other: Reaction }> = {
  report: { full: 'end', other: 'end' },
  enospc: { full: 'wait', other: 'end' },
  stop: { full: 'wait', other: 'wait' },
  ignore: { full: 'again', other: 'again' },
}

/** What a policy makes of an error. No waiting mends what is corrupt. */
export function reactionTo(policy: ErrorPolicy, { kind }: BlockError): Reaction {
  if (kind === 'corrupt') return 'end'
  return REACTIONS[policy][kind === 'no-space' ? 'full' : 'other']
}
