// A store that does one request wrong, or many late: for tests of what a repository makes of that.

import type { Random } from '../../src/base/random.ts'
import { BlockError } from '../../src/block/error.ts'
import type { ObjectStatus, ObjectStore } from '../../src/repository/store.ts'

/** What happens to the request. */
export type StoreFault =
  | 'fails' // it is not done, and fails
  | 'unanswered' // it is done, and fails
  | 'twice' // it is done, and again when others have been
  | 'slow' // others overtake it
  | 'cut' // the client dies: this and all later ones are not done

export const STORE_FAULTS: readonly StoreFault[] = ['fails', 'unanswered', 'twice', 'slow', 'cut']

const SLOW_TURNS = 60
const turn = (): Promise<void> => new Promise((resolve) => setImmediate(resolve))

export class FaultStore implements ObjectStore {
  readonly name: string
  readonly #inner: ObjectStore
  readonly #order: Random | undefined
  /** Requests so far. */
  requests = 0
  /** Which request meets the fault, the first being 1. */
  faultAt = Number.POSITIVE_INFINITY
  fault: StoreFault = 'fails'
  /** Second times that are under way. */
  readonly #late = new Set<Promise<unknown>>()

  /** With `order`, every request is overtaken by others now and then. */
  constructor(inner: ObjectStore, order?: Random) {
    this.#inner = inner
    this.name = inner.name
    this.#order = order
  }

  put(key: string, parts: readonly Uint8Array[]): Promise<void> {
    const copies = parts.map((part) => Uint8Array.from(part))
    return this.#do(`put ${key}`, () => this.#inner.put(key, copies))
  }
  get(key: string): Promise<Uint8Array> {
    return this.#do(`get ${key}`, () => this.#inner.get(key))
  }
  getRange(key: string, offset: number, length: number): Promise<Uint8Array> {
    return this.#do(`get ${key}`, () => this.#inner.getRange(key, offset, length))
  }
  status(key: string): Promise<ObjectStatus | undefined> {
    return this.#do(`status of ${key}`, () => this.#inner.status(key))
  }
  list(prefix: string): Promise<string[]> {
    return this.#do(`list ${prefix}`, () => this.#inner.list(prefix))
  }
  remove(key: string): Promise<void> {
    return this.#do(`remove ${key}`, () => this.#inner.remove(key))
  }

  /** Nothing that was begun is under way any more when it resolves. */
  async settled(): Promise<void> {
    await Promise.all(this.#late)
  }

  async #do<T>(what: string, work: () => Promise<T>): Promise<T> {
    const number = ++this.requests
    if (this.fault === 'cut' && number >= this.faultAt) throw failure(what)
    const fault = number === this.faultAt ? this.fault : undefined
    if (fault === 'fails') throw failure(what)
    for (let left = this.#order?.below(3) ?? 0; left > 0; left--) await turn()
    if (fault === 'slow') for (let left = SLOW_TURNS; left > 0; left--) await turn()
    const result = await work()
    if (fault === 'unanswered') throw failure(what)
    if (fault === 'twice') this.#again(work)
    return result
  }

  #again(work: () => Promise<unknown>): void {
    const late = (async () => {
      for (let left = SLOW_TURNS / 4; left > 0; left--) await turn()
      await work().catch(() => undefined)
    })()
    this.#late.add(late)
  }
}

function failure(what: string): BlockError {
  return new BlockError('io', `injected: ${what}`)
}
