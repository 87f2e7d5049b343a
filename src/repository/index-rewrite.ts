// Keeps the indexes in step with the packs: writes those anew that name packs which are about to go, and joins many small ones.
// An index is a copy of directories, so at no time is anything lost with one.

import { INDEX_OBJECT_BYTES, SMALL_INDEXES } from '../base/limits.ts'
import { isBlockError } from '../block/error.ts'
import type { Core } from './core.ts'
import { decodeIndex, encodeIndex } from './index-object.ts'
import { newPackName, type PackDirectory, readDirectory } from './pack.ts'
import { INDEXES } from './spec.ts'

/**
 * New indexes first, then the old ones go. Those that name none of the packs in `gone` stay, unless they are many and small. The
 * packs in `unnamed`, which are in no index, come into one. Returns how many indexes were taken away.
 */
export async function rewriteIndexes(
  core: Pick<Core, 'store' | 'vault' | 'inventory'>,
  gone: ReadonlySet<string>,
  unnamed: readonly PackDirectory[] = [],
): Promise<number> {
  const { store, vault, inventory } = core
  const old = new Set(inventory.indexesOf(gone))
  const small: string[] = []
  for (const key of inventory.indexes.keys()) {
    const size = (await store.status(key))?.size ?? INDEX_OBJECT_BYTES
    if (size < INDEX_OBJECT_BYTES / 4) small.push(key)
  }
  if (small.length > SMALL_INDEXES) for (const key of small) old.add(key)
  let directories: PackDirectory[] = []
  let bytes = 0
  const put = async (): Promise<void> => {
    if (directories.length === 0) return
    await store.put(INDEXES + newPackName(), [encodeIndex(vault, directories)])
    directories = []
    bytes = 0
  }
  const add = async (directory: PackDirectory): Promise<void> => {
    if (gone.has(directory.pack)) return
    directories.push(directory)
    bytes += directory.records.length
    if (bytes >= INDEX_OBJECT_BYTES) await put()
  }
  for (const directory of unnamed) await add(directory)
  for (const key of old) for (const directory of await directoriesOf(core, key)) await add(directory)
  await put()
  for (const key of old) await store.remove(key)
  return old.size
}

/** What the index says; when it was damaged since it was read, what the packs say that it named. */
async function directoriesOf(
  { store, vault, inventory }: Pick<Core, 'store' | 'vault' | 'inventory'>,
  key: string,
): Promise<PackDirectory[]> {
  try {
    return decodeIndex(vault, await store.get(key), `${store.name}: ${key}`)
  } catch (error) {
    if (isBlockError(error, 'not-found')) return []
    if (!isBlockError(error, 'corrupt')) throw error
  }
  const directories: PackDirectory[] = []
  for (const pack of inventory.indexes.get(key) ?? []) {
    try {
      directories.push(await readDirectory(store, vault, pack))
    } catch (error) {
      // What is gone needs no index, and of what is damaged too a check tells.
      if (!isBlockError(error, 'not-found') && !isBlockError(error, 'corrupt')) throw error
    }
  }
  return directories
}
