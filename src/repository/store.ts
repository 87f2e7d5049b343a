// Where a repository's objects are: the few verbs that a folder, S3 or memory can all keep. Objects are created whole and
// never changed. What is in them is not this file's affair.

/** Keys are `name` or `folder/name`, of letters, digits, '.', '_' and '-'. Every failure is a BlockError that names the object. */
export interface ObjectStore {
  /** For messages: a path or a URL. */
  readonly name: string
  /**
   * Creates the object from `parts`, one after the other. When it resolves the object is durable; when it fails, or the host
   * crashes before, there is no object of this name. Kind 'exists' when there is one already, which then stays as it is.
   */
  put(key: string, parts: readonly Uint8Array[]): Promise<void>
  /** All bytes of the object. Kind 'not-found' when there is none. */
  get(key: string): Promise<Uint8Array>
  /** Exactly `length` bytes from `offset`. Kind 'not-found', or 'out-of-range' when the object is shorter. */
  getRange(key: string, offset: number, length: number): Promise<Uint8Array>
  /** Undefined when there is no such object. */
  status(key: string): Promise<ObjectStatus | undefined>
  /** The keys that start with `prefix`, '' or 'folder/', sorted. */
  list(prefix: string): Promise<string[]>
  /** Removes the object, durably; no error when there is none. */
  remove(key: string): Promise<void>
}

/** Where objects are put. */
export type ObjectSink = Pick<ObjectStore, 'put'>

/** The same; what the store could not take is put again whenever `mend` resolves, and not when it throws. */
export function mendedSink(store: ObjectSink, mend: (error: unknown) => Promise<void>): ObjectSink {
  return {
    put: async (key, parts) => {
      for (;;) {
        try {
          return await store.put(key, parts)
        } catch (error) {
          await mend(error)
        }
      }
    },
  }
}

export interface ObjectStatus {
  /** Bytes. */
  readonly size: number
}

const KEY = /^[A-Za-z0-9_-][A-Za-z0-9._-]*(\/[A-Za-z0-9_-][A-Za-z0-9._-]*)?$/

/** True for a key that every store can hold. */
export function isKey(key: string): boolean {
  return key.length <= 200 && KEY.test(key)
}

export function totalLength(parts: readonly Uint8Array[]): number {
  return parts.reduce((sum, part) => sum + part.length, 0)
}
