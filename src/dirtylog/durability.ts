// What a bitmap outlives, and what that asks of a mark. Whatever a bitmap is told to outlive, it never lacks a bit in silence: after what it
// does not outlive it is void.

import type { Entry } from './changes.ts'

/**
 * 'host': everything. 'process': the death of the process; after one of the host the bitmap is void. 'none': only a clean close.
 *
 *             mark of a cold region        mark of a hot one       after a kill     after a power loss
 *   host      record, waits for its sync   record                  exact            covers
 *   process   record                       record                  exact            void
 *   none      nothing                      nothing                 void             void
 */
export const DURABILITIES = ['host', 'process', 'none'] as const
export type Durability = (typeof DURABILITIES)[number]

export function isDurability(word: unknown): word is Durability {
  return (DURABILITIES as readonly unknown[]).includes(word)
}

/** What the most demanding of the bitmaps needs that lack some of the range. */
export function recordFor(bitmaps: readonly Entry[], offset: number, length: number): Durability {
  let needed: Durability = 'none'
  for (const { bits, durability } of bitmaps) {
    if (durability === needed || durability === 'none' || bits.hasAll(offset, length)) continue
    if (durability === 'host') return 'host'
    needed = durability
  }
  return needed
}
