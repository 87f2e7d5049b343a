// Brings a damaged repository back to where all that is in it is whole: what is good in a damaged pack moves to a new one, blobs of which
// another copy is somewhere come back from there, and indexes are written anew. What has no good copy is gone from the packs
// afterwards: it is stored again when a backup meets the same content, and is whole then in the old backups too.

import { isBlockError } from '../block/error.ts'
import type { CheckReport } from './check.ts'
import { type Core, storeClock } from './core.ts'
import { rewriteIndexes } from './index-rewrite.ts'
import { newBackupId } from './manifest.ts'
import { packKey, type PackDirectory, readDirectory } from './pack.ts'
import { placedBlobs, visitPack } from './pack-reader.ts'
import { PackWriter } from './pack-writer.ts'
import { refuseRivals, Session } from './session.ts'
import { INDEXES, PACKS, SESSIONS } from './spec.ts'

export interface RepairReport {
  /** Packs that were taken away, and blobs that moved out of them. */
  readonly packs: readonly string[]
  readonly moved: number
  /** Blobs that came back from another copy, and those of which there is none. */
  readonly recovered: number
  readonly lost: number
  /** Indexes that were taken away or written anew. */
  readonly indexes: number
}

/**
 * Works on what a check found; what a check found that is no pack or index is left alone. Kind 'busy' while a pruning is at work.
 */
export async function repairRepository(core: Core, found: CheckReport): Promise<RepairReport> {
  const { store, vault, inventory } = core
  const session = await Session.begin(core, { id: newBackupId(core.now()), kind: 'prune' })
  try {
    await refuseRivals(core, session.id, (await storeClock(store, SESSIONS + session.id))())
    const { blobs } = await inventory.readFromStore()
    const keys = found.objects.map(({ key }) => key)
    const badIndexes = keys.filter((key) => key.startsWith(INDEXES))
    const badPacks = new Set(keys.filter((key) => key.startsWith(PACKS)).map((key) => key.slice(PACKS.length)))
    const there = (await store.list(PACKS)).map((key) => key.slice(PACKS.length))
    const directories = await directoriesOf(core, there)
    // A pack that nobody can say the content of stays as it is: it may be brought back from elsewhere.
    const gone = new Set([...badPacks].filter((pack) => directories.has(pack) || !there.includes(pack)))
    const writer = new PackWriter(store, vault, blobs, session.id.slice(-8), inventory)
    const lost = new Map<string, Uint8Array>()
    let moved = 0
    for (const pack of gone) {
      const directory = directories.get(pack)
      if (directory !== undefined) moved += await moveGood(core, writer, directory, lost)
    }
    const good = [...directories.values()].filter(({ pack }) => !gone.has(pack))
    const recovered = await recover(core, writer, lost, good)
    await writer.finish()
    for (const key of badIndexes) await store.remove(key)
    const named = new Set([...inventory.indexes.values()].flat())
    const unnamed = good.filter(({ pack }) => !named.has(pack))
    const rewritten = await rewriteIndexes(core, gone, unnamed)
    for (const pack of gone) await store.remove(packKey(pack))
    await inventory.readAnew()
    return { packs: [...gone], moved, recovered, lost: lost.size, indexes: badIndexes.length + rewritten }
  } finally {
    await session.end()
  }
}

/** The directory of each pack: its own, or what an index says of it. */
async function directoriesOf(core: Core, packs: readonly string[]): Promise<Map<string, PackDirectory>> {
  const { store, vault, inventory } = core
  const found = new Map<string, PackDirectory>()
  for (const pack of packs) {
    try {
      found.set(pack, await readDirectory(store, vault, pack))
    } catch (error) {
      if (!isBlockError(error)) throw error
      const copy = await inventory.copyOf(pack)
      if (copy !== undefined) found.set(pack, copy)
    }
  }
  return found
}

/** Copies what is good of a pack, and adds the rest to `lost`; returns how many blobs were good. */
async function moveGood(
  core: Core,
  writer: PackWriter,
  directory: PackDirectory,
  lost: Map<string, Uint8Array>,
): Promise<number> {
  let moved = 0
  await visitPack(core, directory, ({ id, record }, form, reason) => {
    if (reason !== undefined) {
      lost.set(hexOf(id), id)
      return
    }
    writer.add(id, form, record)
    moved++
  })
  const room = writer.room()
  if (room !== undefined) await room
  return moved
}

/** Looks for other copies of what was lost; returns how many there were. What was found is taken out of `lost`. */
async function recover(
  core: Core,
  writer: PackWriter,
  lost: Map<string, Uint8Array>,
  directories: readonly PackDirectory[],
): Promise<number> {
  let recovered = 0
  for (const directory of directories) {
    if (!placedBlobs(directory).some(({ id }) => lost.has(hexOf(id)))) continue
    await visitPack(core, directory, ({ id, record }, form, reason) => {
      if (reason !== undefined || !lost.delete(hexOf(id))) return
      writer.add(id, form, record)
      recovered++
    })
  }
  return recovered
}

const hexOf = (id: Uint8Array): string => Buffer.from(id).toString('hex')
