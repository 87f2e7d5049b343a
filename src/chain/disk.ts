// What the guest sees: one disk over its chain. Every guest request passes here, in this order:
//
//   gate (closed while drained) -> interceptors (save old data, claim ranges) -> dirty log (mark) -> chain
//                               -> interceptors again, when the request is done
//
// A request that completes within the call allocates nothing; the first step that takes time turns the rest into one
// promise. The disk knows nothing of jobs: they attach interceptors.

import { threadGuests } from '../block/thread-guests.ts'
import { DRAIN_TIMEOUT_MS } from '../base/limits.ts'
import type { BlockDevice, Capabilities, ExtentVisitor, Pending } from '../block/device.ts'
import { BlockError } from '../block/error.ts'
import type { DirtyLog } from '../dirtylog/dirty-log.ts'
import type { Chain } from './chain.ts'
import { LatencyMeter } from './latency-meter.ts'

/** A guest's change of the disk; `from` and `at` are its data when it is a write. */
export interface Change {
  readonly kind: 'write' | 'zero' | 'trim'
  readonly offset: number
  readonly length: number
  readonly from: Uint8Array
  readonly at: number
  readonly flags: number
}

/** How long drains held the guest, since the disk was opened. */
export interface Pauses {
  readonly count: number
  /** Milliseconds: of the last one, and of the longest. */
  readonly lastMs: number
  readonly longestMs: number
}

/** Sees every change of the disk on its way. It must not fail the guest for reasons of its own. */
export interface Interceptor {
  /** The change waits until this is done. */
  before(change: Change): Pending
  /** The change ended, with success or without; its acknowledgement waits until this is done. */
  after(change: Change, succeeded: boolean): Pending
}

const NOTHING = new Uint8Array(0)

export class Disk implements BlockDevice {
  readonly name: string
  readonly chain: Chain
  readonly log: DirtyLog
  /** The same for the disk's whole life: a request that comes while layers change waits at the gate, it is not refused. */
  readonly can: Capabilities
  #interceptors: readonly Interceptor[] = []
  #inFlight = 0
  #drains = 0
  #gate: { readonly open: Promise<void>; readonly release: () => void; readonly sinceMs: number } | undefined
  #pauses: Pauses = { count: 0, lastMs: 0, longestMs: 0 }
  #whenIdle: (() => void) | undefined
  /** What the guest's requests for data take, while somebody listens. */
  #meter: LatencyMeter | undefined
  #listeners = 0

  constructor(name: string, chain: Chain, log: DirtyLog) {
    this.name = name
    this.chain = chain
    this.log = log
    this.can = { ...chain.can, write: true }
  }

  get size(): number {
    return this.chain.size
  }

  /** True while a drain holds requests back. */
  get drained(): boolean {
    return this.#drains > 0
  }

  get pauses(): Pauses {
    return this.#pauses
  }

  /** True while somebody sees the disk's changes on their way, and relies on seeing all of them. */
  get intercepted(): boolean {
    return this.#interceptors.length > 0
  }

  read(offset: number, length: number, into: Uint8Array, at: number): Pending {
    threadGuests.requests++
    if (this.#gate !== undefined) return this.#afterGate(() => this.read(offset, length, into, at))
    return this.#served(this.chain.read(offset, length, into, at))
  }

  write(offset: number, length: number, from: Uint8Array, at: number, flags: number): Pending {
    threadGuests.requests++
    if (this.#gate !== undefined || this.#interceptors.length > 0) {
      return this.#change({ kind: 'write', offset, length, from, at, flags })
    }
    const marked = this.log.mark(offset, length)
    if (marked !== undefined) {
      return this.#served(marked.then(() => this.chain.write(offset, length, from, at, flags)))
    }
    return this.#served(this.chain.write(offset, length, from, at, flags))
  }

  zero(offset: number, length: number, flags: number): Pending {
    threadGuests.requests++
    return this.#change({ kind: 'zero', offset, length, from: NOTHING, at: 0, flags })
  }

  trim(offset: number, length: number, flags: number): Pending {
    threadGuests.requests++
    return this.#change({ kind: 'trim', offset, length, from: NOTHING, at: 0, flags })
  }

  flush(): Pending {
    if (this.#gate !== undefined) return this.#afterGate(() => this.flush())
    return this.#counted(this.chain.flush())
  }

  extents(offset: number, length: number, visit: ExtentVisitor): Pending {
    if (this.#gate !== undefined) return this.#afterGate(() => this.extents(offset, length, visit))
    return this.#counted(this.chain.extents(offset, length, visit))
  }

  /**
   * Runs work that reads the chain for somebody other than the guest: it waits while the disk is drained, and a drain waits
   * for it. The work itself must not come back to the gate.
   */
  async admit(work: () => Promise<void>): Promise<void> {
    while (this.#gate !== undefined) await this.#gate.open
    await this.#counted(work())
  }

  /** A meter of what the guest's requests for data take from now on, flushes apart; it ends with `unlisten`. */
  listen(): LatencyMeter {
    this.#listeners++
    return (this.#meter ??= new LatencyMeter())
  }

  unlisten(): void {
    if (--this.#listeners === 0) this.#meter = undefined
  }

  /** Adds an interceptor for the changes that start from now on; the first attached is asked first. */
  attach(interceptor: Interceptor): void {
    this.#interceptors = [...this.#interceptors, interceptor]
  }

  /** Takes it off for the changes that start from now on; those in flight still end with it. */
  detach(interceptor: Interceptor): void {
    this.#interceptors = this.#interceptors.filter((other) => other !== interceptor)
  }

  /**
   * Holds new requests back and waits until none is in flight. Ends with `undrain`; drains nest. Kind 'timeout', and
   * nothing held back, when the requests in flight do not end in time.
   */
  async drain(timeoutMs: number = DRAIN_TIMEOUT_MS): Promise<void> {
    this.#drains++
    if (this.#gate === undefined) {
      let release = (): void => {}
      const open = new Promise<void>((resolve) => (release = resolve))
      this.#gate = { open, release, sinceMs: performance.now() }
    }
    if (this.#inFlight === 0) return
    let timer: NodeJS.Timeout | undefined
    const idle = new Promise<boolean>((resolve) => {
      const earlier = this.#whenIdle
      this.#whenIdle = () => {
        earlier?.()
        resolve(true)
      }
      timer = setTimeout(() => resolve(false), timeoutMs)
    })
    const isIdle = await idle
    clearTimeout(timer)
    if (isIdle) return
    this.undrain()
    throw new BlockError('timeout', `${this.name}: requests in flight did not end within ${timeoutMs} ms`, {
      device: this.name,
    })
  }

  undrain(): void {
    this.#drains--
    if (this.#drains > 0) return
    const gate = this.#gate
    if (gate === undefined) return
    this.#gate = undefined
    const lastMs = performance.now() - gate.sinceMs
    const { count, longestMs } = this.#pauses
    this.#pauses = { count: count + 1, lastMs, longestMs: Math.max(longestMs, lastMs) }
    gate.release()
  }

  /** Closes the chain. The caller drains first and closes the log. */
  async close(): Promise<void> {
    await this.chain.close()
  }

  #change(change: Change): Pending {
    if (this.#gate !== undefined) return this.#afterGate(() => this.#change(change))
    const interceptors = this.#interceptors
    const steps = interceptors.length + 2
    for (let step = 0; step < steps; step++) {
      // A failure within the call still has to end what the interceptors began: that is the promise's work, too.
      let pending: Pending
      try {
        pending = this.#step(step, interceptors, change)
      } catch (error) {
        pending = Promise.reject(error)
      }
      if (pending !== undefined) return this.#served(this.#finish(step, pending, interceptors, change))
    }
    return this.#end(interceptors, change)
  }

  /** One step forward: each interceptor's `before`, the mark, the chain. */
  #step(step: number, interceptors: readonly Interceptor[], change: Change): Pending {
    const interceptor = interceptors[step]
    if (interceptor !== undefined) return interceptor.before(change)
    if (step === interceptors.length) return this.log.mark(change.offset, change.length)
    const { offset, length, flags } = change
    if (change.kind === 'write') return this.chain.write(offset, length, change.from, change.at, flags)
    return change.kind === 'zero' ? this.chain.zero(offset, length, flags) : this.chain.trim(offset, length, flags)
  }

  /** The rest of a change that takes time, from step `step` whose work is `pending`. */
  async #finish(step: number, pending: Pending, interceptors: readonly Interceptor[], change: Change): Promise<void> {
    let reached = step
    try {
      await pending
      for (reached = step + 1; reached < interceptors.length + 2; reached++) {
        const next = this.#step(reached, interceptors, change)
        if (next !== undefined) await next
      }
    } catch (error) {
      for (const interceptor of interceptors.slice(0, reached)) await interceptor.after(change, false)
      throw error
    }
    for (const interceptor of interceptors) await interceptor.after(change, true)
  }

  #end(interceptors: readonly Interceptor[], change: Change): Pending {
    for (let i = 0; i < interceptors.length; i++) {
      const pending = (interceptors[i] as Interceptor).after(change, true)
      if (pending !== undefined) return this.#served(this.#endRest(i + 1, pending, interceptors, change))
    }
    return this.#served(undefined)
  }

  async #endRest(from: number, pending: Pending, interceptors: readonly Interceptor[], change: Change): Promise<void> {
    await pending
    for (const interceptor of interceptors.slice(from)) await interceptor.after(change, true)
  }

  async #afterGate(request: () => Pending): Promise<void> {
    while (this.#gate !== undefined) await this.#gate.open
    const pending = request()
    if (pending !== undefined) await pending
  }

  /** The same for a guest's request for data, which a meter hears of when there is one. */
  #served(pending: Pending): Pending {
    const meter = this.#meter
    if (pending === undefined) {
      if (meter !== undefined) meter.answered++
      return undefined
    }
    if (meter === undefined) return this.#counted(pending)
    meter.begin()
    return this.#counted(pending.finally(() => meter.end()))
  }

  /** Keeps count of what is in flight, for the drain. */
  #counted(pending: Pending): Pending {
    if (pending === undefined) return undefined
    this.#inFlight++
    return pending.finally(() => {
      this.#inFlight--
      if (this.#inFlight > 0) return
      const whenIdle = this.#whenIdle
      this.#whenIdle = undefined
      whenIdle?.()
    })
  }
}
