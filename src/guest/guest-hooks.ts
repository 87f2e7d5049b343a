// How a guest is told to write down what it has and hold still: by commands that the user gives, or by the QEMU guest agent in it. Each
// call is one try within a time limit; that a guest is thawed whatever happens is the engine's affair (engine/guest-freezer.ts).

import { agentCall } from './guest-agent.ts'
import { runHook } from './run-hook.ts'

/** Commands for the shell, or the path of the agent's socket; the time in milliseconds that the guest may be frozen. */
export interface GuestHooks {
  readonly by:
    | { readonly kind: 'commands'; readonly freeze: string; readonly thaw: string }
    | { readonly kind: 'agent'; readonly socket: string }
  readonly limitMs: number
}

/** Resolves when the guest's file systems hold still. Kinds 'timeout' when it is not done before `signal`, 'io' when it failed. */
export async function freezeGuest(machine: string, { by }: GuestHooks, signal: AbortSignal): Promise<void> {
  if (by.kind === 'agent') await agentCall(by.socket, 'guest-fsfreeze-freeze', signal)
  else await runHook(by.freeze, machine, signal)
}

/** Lets them go on; also a guest that is not frozen. Kinds as for `freezeGuest`. */
export async function thawGuest(machine: string, { by }: GuestHooks, signal: AbortSignal): Promise<void> {
  if (by.kind === 'agent') await agentCall(by.socket, 'guest-fsfreeze-thaw', signal)
  else await runHook(by.thaw, machine, signal)
}
