// A store in memory, for tests and small things. It is gone with the process.

import { assert } from '../../base/assert.ts'
import { systemClock } from '../../base/clock.ts'
import { BlockError } from '../../block/error.ts'
import { isKey, type ObjectStatus, type ObjectStore } from '../store.ts'

export class MemoryStore implements ObjectStore {
  readonly name: string
  readonly #objects = new Map<string, { readonly bytes: Uint8Array; readonly createdMs: number }>()
  readonly #now: () => number

  /** `now` is the store's clock, in milliseconds since 1970. */
  constructor(name = 'memory', now: () => number = () => systemClock.wall()) {
    this.name = name
    this.#now = now
  }

  async put(key: string, parts: readonly Uint8Array[]): Promise<void> {
    assert(isKey(key), `"${key}" is no key of an object`)
    if (this.#objects.has(key)) throw new BlockError('exists', `${this.name}: ${key} exists already`, { path: key })
    this.#objects.set(key, { bytes: Buffer.concat(parts), createdMs: this.#now() })
  }

  async get(key: string): Promise<Uint8Array> {
    return Buffer.from(this.#find(key))
  }

  async getRange(key: string, offset: number, length: number): Promise<Uint8Array> {
    const object = this.#find(key)
    if (offset + length > object.length) {
      const message = `${this.name}: ${key} has ${object.length} bytes, fewer than ${length} at ${offset}`
      throw new BlockError('out-of-range', message, { path: key, offset, length })
    }
    return Buffer.from(object.subarray(offset, offset + length))
  }

  async status(key: string): Promise<ObjectStatus | undefined> {
    const object = this.#objects.get(key)
    return object && { size: object.bytes.length, createdMs: object.createdMs }
  }

  async list(prefix: string): Promise<string[]> {
    return [...this.#objects.keys()].filter((key) => key.startsWith(prefix)).sort()
  }

  async remove(key: string): Promise<void> {
    this.#objects.delete(key)
  }

  #find(key: string): Uint8Array {
    const object = this.#objects.get(key)
    if (object === undefined) throw new BlockError('not-found', `${this.name}: there is no ${key}`, { path: key })
    return object.bytes
  }
}
