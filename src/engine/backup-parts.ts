// Parts of a backup: what the repository has of one so far, kept there for another one to go on from should it break. Each disk's bitmap
// counts from the newest part (backup-party.ts); the older ones, and all when the backup is done, are forgotten.

import { BACKUP_PART_BYTES, BACKUP_PART_LAST_BYTES, BACKUP_PART_MS } from '../base/limits.ts'
import type { Bitmap } from '../bitmap/bitmap.ts'
import type { PartPace, Parts } from '../job/backup.ts'
import type { BackupWriter, Repository } from '../repository/repository.ts'
import type { BackupParty, DiskPlan } from './backup-party.ts'
import type { EngineContext } from './context.ts'

export const PART_PACE: PartPace = {
  everyMs: BACKUP_PART_MS,
  everyBytes: BACKUP_PART_BYTES,
  lastBytes: BACKUP_PART_LAST_BYTES,
}

interface Running {
  readonly parts: readonly { readonly party: BackupParty; readonly plan: DiskPlan }[]
  readonly writer: BackupWriter
  readonly repository: Repository
  readonly usedUp: readonly string[]
}

/** Keeps what the repository has of a running backup; `ids` are the parts that nobody needs once it is done, at first those that are used up. */
export function keptParts(
  context: EngineContext,
  { parts, writer, repository, usedUp }: Running,
): Parts & { readonly ids: readonly string[] } {
  const ids = [...usedUp]
  return {
    ids,
    pace: context.partPace ?? PART_PACE,
    kept: async ({ id }, rest) => {
      ids.push(id)
      for (const [index, { party, plan }] of parts.entries())
        await party.keepPart(plan.bitmap ?? '', writer.id, id, rest[index] as Bitmap)
      await forgetParts(context, repository, ids.splice(0, ids.length - 1))
    },
  }
}

/** What cannot be forgotten here, a pruning forgets. */
export async function forgetParts(
  context: EngineContext,
  repository: Repository,
  ids: readonly string[],
): Promise<void> {
  for (const id of ids)
    await repository.forget(id).catch((error: unknown) => context.report(`${id}: ${(error as Error).message}`))
}
