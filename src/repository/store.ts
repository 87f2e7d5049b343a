// Where a repository's objects are: the few verbs that a folder, S3 or memory can all keep. Objects are created whole and
// never changed; there is no rename. What is in them is not this file's affair.
//
// The store is one for all its clients: what one has done is what the next request of any other finds. The repository's locks
// and its pruning stand on this and on `put` being exclusive.

import { equalBytes } from '../base/bytes.ts'
import { isBlockError } from '../block/error.ts'

/** Keys are `name` or `folder/name`, of letters, digits, '.', '_' and '-'. Every failure is a BlockError that names the object. */
export interface ObjectStore {
  /** For messages: a path or a URL. */
  readonly name: string
  /**
   * Creates the object from `parts`, one after the other. When it resolves the object is durable; when it fails, or the host
   * crashes before, there is no object of this name, or, when the answer was lost (kinds 'io' and 'timeout'), the whole one.
   * Kind 'exists' when there is one already, which then stays as it is.
   */
  put(key: string, parts: readonly Uint8Array[]): Promise<void>
  /** All bytes of the object. Kind 'not-found' when there is none. */
  get(key: string): Promise<Uint8Array>
  /**
   * Exactly `length` bytes from `offset`. Kind 'not-found', or 'out-of-range' when the object is shorter. A store may put them at the
   * beginning of `into`, of that length or more, and answer with a view of it; it leaves it alone once it has answered or failed.
   */
  getRange(key: string, offset: number, length: number, into?: Uint8Array): Promise<Uint8Array>
  /** Undefined when there is no such object. */
  status(key: string): Promise<ObjectStatus | undefined>
  /**
   * The keys that start with `prefix`, '' or 'folder/', sorted. All that were there before the call and still are; of what
   * comes or goes meanwhile any part. A store that lists in pages asks for all of them.
   */
  list(prefix: string): Promise<string[]>
  /** Removes the object, durably; no error when there is none. */
  remove(key: string): Promise<void>
}

/** Where objects are put. */
export type ObjectSink = Pick<ObjectStore, 'put'>

/**
 * The same; what the store could not take is put again whenever `mend` resolves, and not when it throws. A put whose answer was lost
 * had been done: then the object that is there is the one.
 */
export function mendedSink(
  store: Pick<ObjectStore, 'put' | 'get'>,
  mend: (error: unknown) => Promise<void>,
): ObjectSink {
  return {
    put: async (key, parts) => {
      for (let hasFailed = false; ; hasFailed = true) {
        try {
          return await store.put(key, parts)
        } catch (error) {
          if (!isBlockError(error, 'exists')) await mend(error)
          else if (hasFailed && equalBytes(await store.get(key), Buffer.concat(parts))) return
          else throw error
        }
      }
    },
  }
}

export interface ObjectStatus {
  /** Bytes. */
  readonly size: number
  /** When it was created, in milliseconds since 1970, by the store's clock: good to compare two objects of one store. */
  readonly createdMs: number
}

const KEY = /^[A-Za-z0-9_-][A-Za-z0-9._-]*(\/[A-Za-z0-9_-][A-Za-z0-9._-]*)?$/

/** True for a key that every store can hold. */
export function isKey(key: string): boolean {
  return key.length <= 200 && KEY.test(key)
}

export function totalLength(parts: readonly Uint8Array[]): number {
  return parts.reduce((sum, part) => sum + part.length, 0)
}
