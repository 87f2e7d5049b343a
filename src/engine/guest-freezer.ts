// Freezes the guests of machines for a moment, and thaws them whatever happens. Before a guest is frozen the catalog says so, durably;
// only when it was thawed that goes. So one that a crash left frozen is thawed at the next start, one whose backup hangs when its
// time limit is over, and a thaw that fails is tried again until it is done.
//
//   none --freeze--> noted -> frozen --thaw, time limit, failure, next start--> thawing -> none
//                                                                                 +-- again, until it is done

import { GUEST_THAW_AGAIN_MS, GUEST_THAW_MS } from '../base/limits.ts'
import { BlockError } from '../block/error.ts'
import { freezeGuest, type GuestHooks, thawGuest } from '../guest/guest-hooks.ts'
import type { Catalog, CatalogChange } from './catalog.ts'

/** Who freezes guests; the machines' hooks say how. */
export interface GuestHold {
  /**
   * Resolves when the guest is frozen, after whoever has it frozen now; at once for a machine without hooks. Kinds 'busy' while a thaw of it
   * fails, and those of the hook: it is thawed then.
   */
  freeze(machine: string): Promise<void>
  /** Has it go on. Returns for how many milliseconds it was frozen, 0 without hooks; undefined when its time was over before. */
  thaw(machine: string): Promise<number | undefined>
}

export interface GuestFreezerOptions {
  readonly catalog: Pick<Catalog, 'get' | 'list'>
  readonly commit: (changes: readonly CatalogChange[]) => Promise<void>
  readonly report: (message: string) => void
}

interface Frozen {
  readonly hooks: GuestHooks
  readonly sinceMs: number
  timer: NodeJS.Timeout | undefined
  isOver: boolean
  /** The freezing, until it has ended: it is not thawed before. */
  freezing: Promise<unknown> | undefined
  /** The first try of a thaw; those that follow it if it fails are nobody's to wait for. */
  thawing: Promise<void> | undefined
  /** Resolves after that. */
  readonly wasTried: { readonly promise: Promise<void>; readonly resolve: () => void }
}

export class GuestFreezer implements GuestHold {
  readonly #options: GuestFreezerOptions
  readonly #frozen = new Map<string, Frozen>()
  readonly #again = new Set<NodeJS.Timeout>()
  #isClosed = false

  constructor(options: GuestFreezerOptions) {
    this.#options = options
  }

  /** Thaws what the last run left frozen. */
  recover(): void {
    for (const { id, hooks, sinceMs } of this.#options.catalog.list('frozen')) {
      this.#options.report(`machine ${id} was frozen at ${new Date(sinceMs).toISOString()} and not thawed: it is now`)
      this.#frozen.set(id, { ...newEntry(hooks, sinceMs), isOver: true })
      void this.#letGo(id)
    }
  }

  async freeze(machine: string): Promise<void> {
    const { catalog, commit } = this.#options
    const hooks = catalog.get('machine', machine)?.hooks
    if (hooks === undefined) return
    for (let other = this.#frozen.get(machine); other !== undefined; other = this.#frozen.get(machine)) {
      await other.wasTried.promise
      if (this.#frozen.get(machine) === other)
        throw new BlockError('busy', `machine ${machine} is not frozen: its last thaw failed, and is tried again`)
    }
    const frozen = newEntry(hooks, Date.now())
    this.#frozen.set(machine, frozen)
    try {
      await commit([{ put: 'frozen', record: { id: machine, hooks, sinceMs: frozen.sinceMs } }])
    } catch (error) {
      this.#frozen.delete(machine)
      throw error
    }
    frozen.timer = setTimeout(() => {
      frozen.isOver = true
      void this.#letGo(machine)
    }, hooks.limitMs)
    const freezing = freezeGuest(machine, hooks, AbortSignal.timeout(hooks.limitMs))
    frozen.freezing = freezing.catch(() => undefined)
    try {
      await freezing
    } catch (error) {
      // It may have been frozen all the same.
      await this.#letGo(machine)
      throw error
    }
    if (frozen.isOver) throw new BlockError('timeout', `machine ${machine} was not frozen within ${hooks.limitMs} ms`)
  }

  async thaw(machine: string): Promise<number | undefined> {
    const frozen = this.#frozen.get(machine)
    // Without an entry it has no hooks, or was thawed since because its time was over.
    if (frozen === undefined) return this.#options.catalog.get('machine', machine)?.hooks === undefined ? 0 : undefined
    const { isOver, sinceMs } = frozen
    await this.#letGo(machine)
    return isOver ? undefined : Date.now() - sinceMs
  }

  /** Does work while guests are frozen. Kind 'timeout' when the time of one was over before the work was done, which it is then. */
  async during<T>(machines: readonly string[], work: () => Promise<T>): Promise<T> {
    const { result, frozenMs } = await whileFrozen(this, machines, work)
    if (frozenMs !== undefined) return result
    const names = machines.join(', ')
    throw new BlockError('timeout', `it was done, but the guest of ${names} was let go before: its time was over`)
  }

  /** No thaw is tried again from now on: the next start does. */
  close(): void {
    this.#isClosed = true
    for (const { timer } of this.#frozen.values()) clearTimeout(timer)
    for (const timer of this.#again) clearTimeout(timer)
  }

  /** Resolves after the first try. */
  #letGo(machine: string): Promise<void> {
    const frozen = this.#frozen.get(machine)
    if (frozen === undefined) return Promise.resolve()
    clearTimeout(frozen.timer)
    return (frozen.thawing ??= this.#try(machine, frozen, 0).finally(frozen.wasTried.resolve))
  }

  async #try(machine: string, { hooks, freezing }: Frozen, failures: number): Promise<void> {
    try {
      await freezing
      await thawGuest(machine, hooks, AbortSignal.timeout(GUEST_THAW_MS))
      await this.#forget(machine)
      if (failures > 0) this.#options.report(`machine ${machine} was thawed after ${failures} failures`)
    } catch (error) {
      const waitMs = GUEST_THAW_AGAIN_MS[Math.min(failures, GUEST_THAW_AGAIN_MS.length - 1)] as number
      this.#options.report(`machine ${machine} was not thawed: ${(error as Error).message}; again in ${waitMs} ms`)
      if (this.#isClosed) return
      if (this.#options.catalog.get('machine', machine) === undefined) return await this.#forget(machine)
      const timer = setTimeout(() => {
        this.#again.delete(timer)
        const frozen = this.#frozen.get(machine)
        if (frozen !== undefined) void this.#try(machine, frozen, failures + 1)
      }, waitMs)
      this.#again.add(timer)
    }
  }

  /** It is thawed, or there is no such machine any more. */
  async #forget(machine: string): Promise<void> {
    await this.#options.commit([{ remove: 'frozen', id: machine }])
    this.#frozen.delete(machine)
  }
}

/**
 * Does work while the guests of machines are frozen, and thaws them however it ends. `frozenMs` is for how long the longest was; undefined when
 * the time of one was over before the work was done.
 */
export async function whileFrozen<T>(
  hold: GuestHold,
  machines: readonly string[],
  work: () => Promise<T>,
): Promise<{ readonly result: T; readonly frozenMs: number | undefined }> {
  const frozen: string[] = []
  let times: readonly (number | undefined)[] = []
  let result: T
  try {
    for (const machine of machines) {
      await hold.freeze(machine)
      frozen.push(machine)
    }
    result = await work()
  } finally {
    times = await Promise.all(frozen.map((machine) => hold.thaw(machine)))
  }
  const whole = times.flatMap((ms) => ms ?? [])
  return { result, frozenMs: whole.length < times.length ? undefined : Math.max(0, ...whole) }
}

function newEntry(hooks: GuestHooks, sinceMs: number): Frozen {
  const wasTried = Promise.withResolvers<void>()
  return { hooks, sinceMs, timer: undefined, isOver: false, freezing: undefined, thawing: undefined, wasTried }
}
