// What a shard asks about a disk of another one for its job: the control plane passes it on to the shard that has the disk.

import type { Remote } from './calls.ts'
import type { GuestFunctions, PartyFunctions } from './messages.ts'

type FarFunctions = PartyFunctions & GuestFunctions

const NAMES = {
  partyPlan: true,
  partyFreeze: true,
  partyCapture: true,
  partyDurable: true,
  partyThaw: true,
  partyRestrict: true,
  partyStats: true,
  partyKeepPart: true,
  partyDistrust: true,
  partySettle: true,
  guestsHear: true,
  guestsLeave: true,
} as const satisfies Record<keyof FarFunctions, true>

/** `of` finds the shard of a disk. */
export function partyCalls(of: (disk: string) => Promise<Remote<FarFunctions>>): FarFunctions {
  const passOn = (name: string) => {
    return async (disk: string, ...args: readonly unknown[]): Promise<unknown> => {
      const call = (await of(disk))[name as keyof FarFunctions] as (...given: unknown[]) => Promise<unknown>
      return call(disk, ...args)
    }
  }
  const calls = Object.keys(NAMES).map((name) => [name, passOn(name)])
  return Object.fromEntries(calls) as FarFunctions
}
