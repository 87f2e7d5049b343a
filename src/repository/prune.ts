// Takes away what no backup needs, while other clients go on with backups, restores and checks. Packs go in two steps:
//
//   mark     names the packs that will go. Whoever begins later does not rely on them
//   sweep    when all who began before the mark are gone: what still no backup needs is removed
//
// Of a pack with little left in it, that is first copied into another. Whoever is silent for too long is not waited for, but
// fenced (session.ts). docs/internals/repository-format.md shows why no order of events removes what a backup needs.

import { FENCE_KEPT_MS, MARK_PACKS, SMALL_PACK_BYTES, SMALL_PACKS } from '../base/limits.ts'
import { BlockError, isBlockError } from '../block/error.ts'
import { type AllBackups, forgetBackup, outdatedParts, readBackups } from './backups.ts'
import type { BlobIndex } from './blob-index.ts'
import { type Core, storeClock } from './core.ts'
import { rewriteIndexes } from './index-rewrite.ts'
import { steadily } from './inventory.ts'
import { LiveSet } from './live-set.ts'
import { type BackupInfo, isPart, newBackupId } from './manifest.ts'
import { putMark } from './mark.ts'
import { packKey } from './pack.ts'
import { PackWriter } from './pack-writer.ts'
import { repack } from './repack.ts'
import { type KeptBackup, type Retention, type RetentionOutcome, retain } from './retention.ts'
import { listSessions, refuseRivals, type SeenSession, Session, settleSession } from './session.ts'
import { BACKUPS, FORGOTTEN, MARKS, SESSIONS, TAGS } from './spec.ts'

export interface PruneOptions {
  /** Forgets what this does not keep; without it nothing is forgotten. */
  readonly keep?: Retention
  /** Packs of which a smaller part is needed are rewritten, from 0 (never) to 1; 0.7 unless told. */
  readonly repackBelow?: number
  /** Changes nothing: the report says what would be. */
  readonly dryRun?: boolean
  /** Sessions that were silent for so many milliseconds are given up; unless told half an hour, and for restores a week. */
  readonly leaseMs?: number
  /** Is told of steps, each a backup that was looked at or a pack that was rewritten; more may turn out to be needed. */
  readonly progress?: (done: number, total: number) => void
}

/** Counts steps, and tells of them. */
class Steps {
  readonly #tell: (done: number, total: number) => void
  #done = 0
  #total = 0

  constructor(tell: PruneOptions['progress']) {
    this.#tell = tell ?? (() => undefined)
  }

  expect(more: number): void {
    this.#total += more
    this.#tell(this.#done, this.#total)
  }

  readonly step = (): void => this.#tell(++this.#done, this.#total)
}

/** Bytes are those of blobs, as they are stored. */
export interface PruneReport {
  readonly dryRun: boolean
  /** What the policy kept and why, and what it had forgotten. */
  readonly kept: readonly KeptBackup[]
  readonly forgotten: readonly string[]
  readonly removedPacks: number
  readonly removedBytes: number
  /** Packs that were rewritten, and what of them was needed. */
  readonly repackedPacks: number
  readonly repackedBytes: number
  /** Packs that are marked and go with a later pruning, because these sessions began before. */
  readonly waitingPacks: number
  readonly waitingBytes: number
  readonly waitingFor: readonly string[]
  /** Sessions that were silent for too long, and can no longer finish. */
  readonly fenced: readonly string[]
  /** Packs that could not be rewritten because they are damaged. */
  readonly damaged: readonly string[]
}

interface Plan {
  readonly remove: readonly string[]
  readonly repack: readonly string[]
  readonly removeBytes: number
  readonly repackBytes: number
  readonly live: LiveSet
}

interface Swept {
  readonly packs: number
  readonly bytes: number
  readonly waitingPacks: number
  readonly waitingBytes: number
  readonly waitingFor: readonly string[]
}

/** Kinds 'busy' while another pruning is at work, 'corrupt' when damage hides what is needed. */
export async function prune(core: Core, options: PruneOptions): Promise<PruneReport> {
  const { repackBelow = 0.7 } = options
  if (!(repackBelow >= 0 && repackBelow <= 1)) {
    throw new BlockError(
      'invalid-argument',
      `the part below which packs are rewritten is from 0 to 1, not ${repackBelow}`,
    )
  }
  if (options.dryRun === true) return dryRun(core, options, repackBelow)
  const session = await Session.begin(core, { id: newBackupId(core.now()), kind: 'prune' })
  try {
    const clock = await storeClock(core.store, SESSIONS + session.id)
    return await new Pruning(core, session.id, clock, options).run(options.keep, repackBelow)
  } finally {
    await session.end()
  }
}

function dryRun(core: Core, options: PruneOptions, repackBelow: number): Promise<PruneReport> {
  return steadily(core.inventory, ({ blobs }) => dryRunWith(core, blobs, options, repackBelow))
}

async function dryRunWith(
  core: Core,
  blobs: BlobIndex,
  { keep, progress }: PruneOptions,
  repackBelow: number,
): Promise<PruneReport> {
  const all = await readBackups(core)
  await core.inventory.refresh()
  const visible = all.backups.filter(({ id }) => !all.forgotten.has(id))
  const { kept, forgotten } = retainWhole(visible, all.tags, keep)
  const gone = new Set([...all.forgotten, ...forgotten, ...outdatedParts(visible, core.now())])
  const staying = {
    backups: all.backups.filter(({ id }) => !gone.has(id)),
    damaged: all.damaged.filter(({ id }) => !gone.has(id)),
  }
  const live = await liveSet(core, staying, blobs, new Steps(progress))
  const plan = await planOf(live, [], repackBelow)
  return {
    ...NOTHING,
    dryRun: true,
    kept,
    forgotten,
    removedPacks: plan.remove.length,
    removedBytes: plan.removeBytes,
    repackedPacks: plan.repack.length,
    repackedBytes: plan.repackBytes,
  }
}

/** What the policy says of the backups; parts are no one's. */
function retainWhole(
  visible: readonly BackupInfo[],
  tags: AllBackups['tags'],
  keep: Retention | undefined,
): RetentionOutcome {
  if (keep === undefined) return { kept: [], forgotten: [] }
  const whole = visible.filter((info) => !isPart(info))
  return retain(whole, tags, keep)
}

const NOTHING: PruneReport = {
  dryRun: false,
  kept: [],
  forgotten: [],
  removedPacks: 0,
  removedBytes: 0,
  repackedPacks: 0,
  repackedBytes: 0,
  waitingPacks: 0,
  waitingBytes: 0,
  waitingFor: [],
  fenced: [],
  damaged: [],
}

class Pruning {
  readonly #core: Core
  readonly #id: string
  readonly #clock: () => number
  readonly #leaseMs: number | undefined
  readonly #steps: Steps
  readonly #fenced: string[] = []

  constructor(core: Core, id: string, clock: () => number, { leaseMs, progress }: PruneOptions) {
    this.#core = core
    this.#id = id
    this.#clock = clock
    this.#leaseMs = leaseMs
    this.#steps = new Steps(progress)
  }

  async run(keep: Retention | undefined, repackBelow: number): Promise<PruneReport> {
    const { store, vault, inventory } = this.#core
    await refuseRivals(this.#core, this.#id, this.#clock(), this.#leaseMs)
    const { kept, forgotten } = await this.#forget(keep)
    await this.#dropForgotten()
    const before = await this.#sweep()
    const plan = await this.#plan(repackBelow)
    const packs = new PackWriter(store, vault, plan.live.blobs, this.#id.slice(-8), inventory)
    this.#steps.expect(plan.repack.length)
    const repacked = await repack(this.#core, plan.live, packs, plan.repack, this.#steps.step)
    const going = [...plan.remove, ...repacked.packs]
    for (let at = 0; at < going.length; at += MARK_PACKS) {
      await putMark(store, vault, going.slice(at, at + MARK_PACKS))
    }
    const after = await this.#sweep()
    await this.#dropFences()
    return {
      dryRun: false,
      kept,
      forgotten,
      removedPacks: before.packs + after.packs,
      removedBytes: before.bytes + after.bytes,
      repackedPacks: repacked.packs.length,
      repackedBytes: repacked.bytes,
      waitingPacks: after.waitingPacks,
      waitingBytes: after.waitingBytes,
      waitingFor: after.waitingFor,
      fenced: this.#fenced,
      damaged: repacked.damaged,
    }
  }

  /** Everybody else who has to be waited for. */
  async #liveSessions(): Promise<SeenSession[]> {
    const live: SeenSession[] = []
    for (const session of await listSessions(this.#core, this.#clock())) {
      if (session.id === this.#id) continue
      const state = await settleSession(this.#core, session, this.#leaseMs)
      if (state === 'live') live.push(session)
      else if (state === 'fenced') this.#fenced.push(session.id)
    }
    return live
  }

  async #forget(keep: Retention | undefined): Promise<RetentionOutcome> {
    const { backups, forgotten, tags } = await readBackups(this.#core)
    const visible = backups.filter(({ id }) => !forgotten.has(id))
    const outcome = retainWhole(visible, tags, keep)
    for (const id of [...outcome.forgotten, ...outdatedParts(visible, this.#core.now())])
      await forgetBackup(this.#core, id)
    return outcome
  }

  /**
   * Removes the manifests of forgotten backups, but those that somebody makes an incremental of or restores. The sessions are asked for
   * after the notes: who begins later has seen the note and takes another parent.
   */
  async #dropForgotten(): Promise<void> {
    const { store } = this.#core
    const notes = (await store.list(FORGOTTEN)).map((key) => key.slice(FORGOTTEN.length))
    const sessions = await this.#liveSessions()
    if (sessions.some(({ kind }) => kind === 'unreadable')) return
    const held = new Set(sessions.flatMap(({ parents }) => parents))
    const tags = await store.list(TAGS)
    for (const id of notes) {
      if (held.has(id)) continue
      await store.remove(BACKUPS + id)
      for (const key of tags) if (key.startsWith(`${TAGS}${id}.`)) await store.remove(key)
      await store.remove(FORGOTTEN + id)
    }
  }

  async #plan(repackBelow: number): Promise<Plan> {
    const busy = (await this.#liveSessions()).map(({ id }) => id.slice(-8))
    const all = await readBackups(this.#core)
    const { blobs } = await this.#core.inventory.readAnew()
    return planOf(await liveSet(this.#core, all, blobs, this.#steps), busy, repackBelow)
  }

  /**
   * Removes the packs of all marks that everybody at work knows of, unless a backup needs them. In this order: the marks, the
   * sessions, the manifests, and last what there is. Who is not among the sessions has made its backup visible before the manifests
   * were listed, or has begun since and knows the marks.
   */
  async #sweep(): Promise<Swept> {
    const { store, inventory } = this.#core
    const keys = new Set(await store.list(MARKS))
    if (keys.size === 0) return { packs: 0, bytes: 0, waitingPacks: 0, waitingBytes: 0, waitingFor: [] }
    // Who restores a backup relies on its manifest, and finds moved packs by it.
    const sessions = (await this.#liveSessions()).filter(({ kind }) => kind !== 'prune' && kind !== 'restore')
    const all = await readBackups(this.#core)
    const { marks, blobs } = await inventory.readAnew()
    const live = await liveSet(this.#core, all, blobs, this.#steps)
    const bytes = await live.bytesByPack()
    const ready = [...marks.values()].filter(
      ({ key }) => keys.has(key) && sessions.every(({ seen }) => seen.includes(key)),
    )
    const known = new Set(ready.flatMap(({ packs }) => packs))
    const gone = new Map<string, number>()
    const waiting = new Map<string, number>()
    for (const [pack, number] of live.blobs.numberedPacks()) {
      if (!live.blobs.isCondemned(pack) || bytes[number] !== 0) continue
      const into = known.has(pack) ? gone : waiting
      into.set(pack, live.blobs.packBytes(number))
    }
    // Indexes first: an index that names a pack which is not there is damage.
    await rewriteIndexes(this.#core, new Set(gone.keys()))
    for (const pack of gone.keys()) await store.remove(packKey(pack))
    // A mark that cannot be read holds nobody back: what it named is found again.
    const unreadable = [...keys].filter((key) => inventory.damaged.has(key))
    for (const key of [...ready.map((mark) => mark.key), ...unreadable]) await store.remove(key)
    return {
      packs: gone.size,
      bytes: sum(gone.values()),
      waitingPacks: waiting.size,
      waitingBytes: sum(waiting.values()),
      waitingFor: waiting.size === 0 ? [] : sessions.map(({ id, holder }) => `${id} of ${holder}`),
    }
  }

  /** Fences are kept for so long that nobody whom they hold back can still be there. */
  async #dropFences(): Promise<void> {
    const { store } = this.#core
    for (const id of (await readBackups(this.#core)).fences) {
      const status = await store.status(BACKUPS + id)
      if (status !== undefined && this.#clock() - status.createdMs > FENCE_KEPT_MS) await store.remove(BACKUPS + id)
    }
  }
}

/** What all backups need. Kind 'corrupt' when that cannot be known, with what to do. */
async function liveSet(
  core: Core,
  all: Pick<AllBackups, 'backups' | 'damaged'>,
  blobs: BlobIndex,
  steps: Steps,
): Promise<LiveSet> {
  const wayOut = '`varve repo check` says what is damaged, and `varve repo forget` gives a backup up'
  const [bad] = all.damaged
  if (bad !== undefined)
    throw new BlockError('corrupt', `nothing is removed while a backup cannot be read: ${bad.reason}: ${wayOut}`)
  const live = new LiveSet(core, blobs)
  steps.expect(all.backups.length)
  for (const info of all.backups) {
    try {
      await live.add(info)
      steps.step()
    } catch (error) {
      if (!isBlockError(error, 'corrupt')) throw error
      const message = `nothing is removed while a backup is damaged: ${error.message}: ${wayOut}`
      throw new BlockError('corrupt', message, error.place, error)
    }
  }
  return live
}

/** Packs of sessions that are at work are left alone: what is in them is not referred to yet. `busy` are their owners. */
async function planOf(live: LiveSet, busy: readonly string[], repackBelow: number): Promise<Plan> {
  const { blobs } = live
  const bytes = await live.bytesByPack()
  const remove: string[] = []
  const repacked: string[] = []
  const small: string[] = []
  let removeBytes = 0
  let repackBytes = 0
  const sizes = new Map<string, number>()
  for (const [pack, number] of blobs.numberedPacks()) {
    if (number >= bytes.length || blobs.isCondemned(pack) || busy.some((owner) => pack.startsWith(owner))) continue
    const total = blobs.packBytes(number)
    const needed = bytes[number] as number
    sizes.set(pack, needed)
    if (needed === 0) {
      remove.push(pack)
      removeBytes += total
    } else if (needed < total * repackBelow) {
      repacked.push(pack)
      removeBytes += total - needed
    } else if (total < SMALL_PACK_BYTES) small.push(pack)
  }
  // Many small packs become few large ones.
  if (repackBelow > 0 && small.length > SMALL_PACKS) repacked.push(...small)
  for (const pack of repacked) repackBytes += sizes.get(pack) as number
  return { remove, repack: repacked, removeBytes, repackBytes, live }
}

function sum(numbers: Iterable<number>): number {
  let total = 0
  for (const each of numbers) total += each
  return total
}
