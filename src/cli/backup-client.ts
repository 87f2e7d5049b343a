// A backup that this command makes itself, of disks of a daemon here or on another machine, into a repository that this command opens: it has
// the daemon open a view, reads it over NBD (view-session.ts), and writes what the daemon's own backup would (job/backup.ts), with
// parts to go on from and proofs. The daemon's bits drop only when the backup is whole and durable.

import path from 'node:path'
import type { BodyInput } from '../api/schema.ts'
import { BlockError } from '../block/error.ts'
import type { CheckpointWish } from '../engine/checkpoints.ts'
import { type EarlierBackup, type Way, wayByComparison, wayFrom } from '../engine/backup-way.ts'
import { PART_PACE } from '../engine/backup-parts.ts'
import { type BackupDisk, type BackupResult, type Parts, runBackup } from '../job/backup.ts'
import { Job } from '../job/job.ts'
import { mend } from '../job/mend.ts'
import { newProof, type ProofWish } from '../job/proof.ts'
import type { JobTerms } from '../job/terms.ts'
import { type BackupReader, type BackupWriter, newBackupId, type Repository } from '../repository/repository.ts'
import { Progress } from './progress.ts'
import { type ViewedDisk, ViewSession } from './view-session.ts'

export interface ClientBackup {
  /** URI of the daemon. */
  readonly from: string
  /** Names of machines or disks there. */
  readonly machines: readonly string[]
  readonly full: boolean
  readonly prove: number | undefined
  /** The checkpoint that the changes are counted from, and the one that its moment becomes. */
  readonly marks: CheckpointWish
  readonly leaseMs: number
  readonly terms: JobTerms
}

/** What came of it, as the details of a daemon's job have it. */
export interface ClientOutcome {
  readonly details: Readonly<Record<string, unknown>>
  /** The daemon knows that the backup is whole: its next one counts from it. */
  readonly isCompleted: boolean
}

/** Kinds of reaching the daemon, of its views, and of the repository. */
export async function backUpFrom(repository: Repository, wish: ClientBackup): Promise<ClientOutcome> {
  const { proof } = newProof(wish.prove)
  const moment = Date.now()
  const id = newBackupId(moment)
  const { backups: whole, parts } = await repository.list()
  const known = new Map([...whole, ...parts].map((info) => [info.id, info]))
  const { session, ways } = await openSession(repository, wish, { id, backups: known, whole: proof !== undefined })
  try {
    const run = new ClientRun(repository, { session, ways, id, moment, proof, wish })
    return await run.go(parts.map((part) => part.id))
  } finally {
    await session.close()
  }
}

interface Known {
  readonly id: string
  readonly backups: ReadonlyMap<string, EarlierBackup>
  /** All can be read, for a proof. */
  readonly whole: boolean
}

/** Asks for what changed; where the repository cannot go on from there, once more for all of these disks. */
async function openSession(
  repository: Repository,
  { from, machines, leaseMs, marks, ...wish }: ClientBackup,
  known: Known,
): Promise<{ readonly session: ViewSession; readonly ways: readonly Way[] }> {
  const { id, whole } = known
  const ask = (full: readonly string[]): Promise<ViewSession> => {
    const target = { name: repository.id, moment: id, full: [...full], ...marks }
    const request: BodyInput<'openView'> = { disks: [...machines], target, whole, leaseMs }
    return ViewSession.open(from, { ...request, leaseMs })
  }
  const first = await ask([])
  const ways = first.disks.map(({ disk, size, since, reason }): Way => {
    if (wish.full) return { parent: undefined, kind: 'full', reason: 'asked for' }
    if (since === undefined) return wayByComparison({ name: disk, size }, known.backups, reason)
    return wayFrom({ name: disk, size }, known.backups, since)
  })
  const others = first.disks.filter(({ kind }, index) => kind === 'incremental' && ways[index]?.parent === undefined)
  if (others.length === 0) return { session: first, ways: toldBy(first.disks, ways, marks) }
  await first.abort()
  await first.close()
  const { since, ...rest } = marks
  if (since === undefined) return { session: await ask(others.map(({ disk }) => disk)), ways }
  const usual = await openSession(repository, { from, machines, leaseMs, marks: rest, ...wish }, known)
  const why = `not since ${since}: ${ways.find(({ parent }) => parent === undefined)?.reason}`
  return { ...usual, ways: usual.ways.map((way) => ({ ...way, reason: `${way.reason}; ${why}` })) }
}

/** With a checkpoint the daemon knows what the changes are counted from, or why not from there. */
function toldBy(disks: readonly ViewedDisk[], ways: readonly Way[], { since }: CheckpointWish): readonly Way[] {
  if (since === undefined) return ways
  return ways.map((way, index) => ({ ...way, reason: disks[index]?.reason ?? way.reason }))
}

interface RunOptions {
  readonly session: ViewSession
  readonly ways: readonly Way[]
  readonly id: string
  readonly moment: number
  readonly proof: ProofWish | undefined
  readonly wish: ClientBackup
}

class ClientRun {
  readonly #repository: Repository
  readonly #options: RunOptions
  readonly #job: Job
  readonly #readers = new Map<string, BackupReader>()
  /** The newest part of this run. */
  #kept: readonly string[] = []

  constructor(repository: Repository, options: RunOptions) {
    this.#repository = repository
    this.#options = options
    const { terms, machines } = options.wish
    // Nobody could resume it: unless it is told to try again, an error ends it.
    const onError = terms.onError ?? 'report'
    this.#job = new Job({ id: options.id, kind: 'backup', subject: machines.join('+'), terms: { ...terms, onError } })
  }

  /** `parts` are those that the repository has of broken backups. */
  async go(parts: readonly string[]): Promise<ClientOutcome> {
    const { session, ways, id } = this.#options
    const progress = new Progress(id)
    const unwatch = this.#job.watch(({ status }) => progress.update(status.done, status.total))
    const cancel = (): void => this.#job.giveUp(new BlockError('cancelled', `backup ${id} was interrupted`))
    process.once('SIGINT', cancel)
    try {
      this.#job.move('running')
      const result = await this.#backUp()
      this.#job.describe({ ...this.#how, readBytes: result.readBytes, storedBytes: result.info.storedBytes })
      const isCompleted = await session.complete()
      const used = ways.flatMap(({ parent }) => (parent !== undefined && parts.includes(parent) ? [parent] : []))
      if (isCompleted) await this.#forget([...used, ...this.#kept])
      return { details: this.#job.status.details, isCompleted }
    } catch (error) {
      await session.abort()
      throw error
    } finally {
      process.off('SIGINT', cancel)
      unwatch()
      progress.end()
      for (const reader of this.#readers.values()) await reader.close()
    }
  }

  async #backUp(): Promise<BackupResult> {
    const { session, ways, proof, wish } = this.#options
    const disks = await this.#disks()
    const writer = await this.#begin()
    return runBackup(this.#job, {
      disks,
      writer,
      notes: { disks: ways.map(({ kind, reason, compared }) => ({ kind, reason, ...(compared && { compared }) })) },
      proof,
      distrust: (index, reason) => session.distrust((disks[index] as BackupDisk).name, reason),
      parts: wish.full ? undefined : this.#parts(),
    })
  }

  async #begin(): Promise<BackupWriter> {
    const { session, ways, id, moment, wish } = this.#options
    const request = {
      id,
      machine: wish.machines.join('+'),
      moment,
      kind: ways.every(({ kind }) => kind === 'incremental') ? ('incremental' as const) : ('full' as const),
      disks: session.disks.map(({ disk: name, size }, index) => {
        const before = ways[index]?.parent ?? ways[index]?.compared
        return { name, size, ...(before && { parent: { backup: before, disk: name } }) }
      }),
    }
    return this.#repository.begin(request, (error) => mend(this.#job, error))
  }

  async #disks(): Promise<BackupDisk[]> {
    const { session, ways, proof } = this.#options
    const disks: BackupDisk[] = []
    for (const [index, view] of session.views.entries()) {
      const { disk: name } = session.disks[index] as (typeof session.disks)[number]
      const { parent, compared } = ways[index] as Way
      const before = compared ?? (proof === undefined ? undefined : parent)
      if (before !== undefined && !this.#readers.has(before))
        this.#readers.set(before, await this.#repository.openBackup(before))
      const device = this.#readers.get(before ?? '')?.disks.find((other) => other.name === name)?.device
      disks.push({ name, view, changed: view.changed, before: device })
    }
    return disks
  }

  #parts(): Parts {
    const { session } = this.#options
    return {
      pace: PART_PACE,
      kept: async ({ id }) => {
        try {
          await session.keepPart(id)
        } catch (error) {
          // No bitmap counts from it.
          await this.#forget([id])
          throw error
        }
        const before = this.#kept
        this.#kept = [id]
        await this.#forget(before)
      },
    }
  }

  /** What is not forgotten now, a pruning forgets. */
  async #forget(parts: readonly string[]): Promise<void> {
    for (const id of parts) await this.#repository.forget(id).catch(() => undefined)
  }

  get #how(): Readonly<Record<string, unknown>> {
    const { session, ways, id } = this.#options
    const disks = session.disks.map(({ disk: name }, index) => ({ name, ...ways[index] }))
    return { backup: id, repository: path.basename(this.#repository.store.name), disks }
  }
}
