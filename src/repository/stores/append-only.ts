// A store of which this client only adds: nothing that a backup needs can be taken away through it, and nobody else can be told to.
// Against one who has the store's own credentials it is no protection: that is a matter of what these allow (docs/repository.md).

import { BlockError } from '../../block/error.ts'
import { FORGOTTEN, KEYS, MARKS, SESSIONS } from '../spec.ts'
import type { ObjectStore, ObjectStatus } from '../store.ts'

/** What has others take things away, or opens a repository. */
const REFUSED = [FORGOTTEN, MARKS, KEYS]

export class AppendOnlyStore implements ObjectStore {
  readonly name: string
  readonly #inner: ObjectStore

  constructor(inner: ObjectStore) {
    this.name = inner.name
    this.#inner = inner
  }

  async put(key: string, parts: readonly Uint8Array[]): Promise<void> {
    if (REFUSED.some((prefix) => key.startsWith(prefix))) throw this.#refused(`put ${key}`)
    return this.#inner.put(key, parts)
  }

  get(key: string): Promise<Uint8Array> {
    return this.#inner.get(key)
  }

  getRange(key: string, offset: number, length: number, into?: Uint8Array): Promise<Uint8Array> {
    return this.#inner.getRange(key, offset, length, into)
  }

  status(key: string): Promise<ObjectStatus | undefined> {
    return this.#inner.status(key)
  }

  list(prefix: string): Promise<string[]> {
    return this.#inner.list(prefix)
  }

  /** Its own sessions end, as long as the store lets them. */
  async remove(key: string): Promise<void> {
    if (!key.startsWith(SESSIONS)) throw this.#refused(`remove ${key}`)
    return this.#inner.remove(key)
  }

  #refused(what: string): BlockError {
    return new BlockError('permission', `${this.name} is open to add only: it does not ${what}`, { path: this.name })
  }
}
