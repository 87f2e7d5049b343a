// What a shard asks about a disk of another one for its backup: the control plane passes it on to the shard that has the disk.

import type { Remote } from './calls.ts'
import type { PartyFunctions } from './messages.ts'

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
} as const satisfies Record<keyof PartyFunctions, true>

/** `of` finds the shard of a disk. */
export function partyCalls(of: (disk: string) => Promise<Remote<PartyFunctions>>): PartyFunctions {
  const passOn = (name: string) => {
    return async (disk: string, ...args: readonly unknown[]): Promise<unknown> => {
      const call = (await of(disk))[name as keyof PartyFunctions] as (...given: unknown[]) => Promise<unknown>
      return call(disk, ...args)
    }
  }
  const calls = Object.keys(NAMES).map((name) => [name, passOn(name)])
  return Object.fromEntries(calls) as PartyFunctions
}
