// A store behind a network that now and then does not answer: tries again what failed or was not answered, a few times, later and later. A
// put that finds its object there after it went unanswered was done the first time.

import { equalBytes } from '../../base/bytes.ts'
import { type Clock, systemClock } from '../../base/clock.ts'
import { STORE_RETRY_MS } from '../../base/limits.ts'
import { type ErrorKind, isBlockError } from '../../block/error.ts'
import type { ObjectStatus, ObjectStore } from '../store.ts'

/** What may be otherwise the next time. A full or forbidden store is so the next time too. */
const PASSING: readonly ErrorKind[] = ['io', 'timeout']

export class RetryingStore implements ObjectStore {
  readonly name: string
  readonly #inner: ObjectStore
  readonly #clock: Pick<Clock, 'sleep'>

  constructor(inner: ObjectStore, clock: Pick<Clock, 'sleep'> = systemClock) {
    this.name = inner.name
    this.#inner = inner
    this.#clock = clock
  }

  put(key: string, parts: readonly Uint8Array[]): Promise<void> {
    return this.#try(async (isFirst) => {
      try {
        await this.#inner.put(key, parts)
      } catch (error) {
        const isOurs = !isFirst && isBlockError(error, 'exists') && (await this.#holds(key, parts))
        if (!isOurs) throw error
      }
    })
  }

  get(key: string): Promise<Uint8Array> {
    return this.#try(() => this.#inner.get(key))
  }

  getRange(key: string, offset: number, length: number, into?: Uint8Array): Promise<Uint8Array> {
    return this.#try(() => this.#inner.getRange(key, offset, length, into))
  }

  status(key: string): Promise<ObjectStatus | undefined> {
    return this.#try(() => this.#inner.status(key))
  }

  list(prefix: string): Promise<string[]> {
    return this.#try(() => this.#inner.list(prefix))
  }

  remove(key: string): Promise<void> {
    return this.#try(() => this.#inner.remove(key))
  }

  async #holds(key: string, parts: readonly Uint8Array[]): Promise<boolean> {
    return equalBytes(await this.#inner.get(key), Buffer.concat(parts))
  }

  async #try<T>(work: (isFirst: boolean) => Promise<T>): Promise<T> {
    for (let tried = 0; ; tried++) {
      try {
        return await work(tried === 0)
      } catch (error) {
        const pause = STORE_RETRY_MS[tried]
        const isPassing = PASSING.some((kind) => isBlockError(error, kind))
        if (!isPassing || pause === undefined) throw error
        await this.#clock.sleep(pause)
      }
    }
  }
}
