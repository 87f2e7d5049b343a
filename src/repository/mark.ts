// Marks: packs that are about to be removed. Whoever begins after a mark is there neither relies on them nor adds them to what it
// makes; when everybody who began before it is gone, what no backup needs of them goes (prune.ts).

import { type BlockError, isBlockError } from '../block/error.ts'
import { newPackName } from './pack.ts'
import { sealFor, unsealFor } from './sealed.ts'
import { fitted, isListOf, isOneOf, matches, type Shape } from './shape.ts'
import { FORMAT_VERSION, MARKS } from './spec.ts'
import type { ObjectStore } from './store.ts'
import type { Vault } from './vault.ts'

/** A mark as it was read. */
export interface Mark {
  readonly key: string
  readonly packs: readonly string[]
}

interface MarkRecord {
  readonly format: typeof FORMAT_VERSION
  readonly packs: readonly string[]
}

const RECORD: Shape<MarkRecord> = {
  format: isOneOf(FORMAT_VERSION),
  packs: isListOf(matches(/^[0-9a-f]{32}$/)),
}

/** Returns the new mark's key. */
export async function putMark(store: ObjectStore, vault: Vault, packs: readonly string[]): Promise<string> {
  const key = MARKS + newPackName()
  await store.put(key, [sealFor(vault, key, { format: FORMAT_VERSION, packs } satisfies MarkRecord)])
  return key
}

/** Undefined when it is gone; a BlockError when it is damaged. */
export async function readMark(store: ObjectStore, vault: Vault, key: string): Promise<Mark | BlockError | undefined> {
  const where = `${store.name}: ${key}`
  try {
    const { packs } = fitted(RECORD, unsealFor(vault, key, await store.get(key), where), where)
    return { key, packs }
  } catch (error) {
    if (isBlockError(error, 'not-found')) return undefined
    if (isBlockError(error, 'corrupt') || isBlockError(error, 'invalid-format')) return error
    throw error
  }
}
