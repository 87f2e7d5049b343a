// The switch-over of a migration at its source: bitmaps go ahead, the copy is sealed, the authority is given up durably, and then the
// target is asked to take it, for as long as it takes to be answered. Nobody writes here from the moment at which the record says
// handed-over until the target has said that it never took the disk, or an operator has said so in its place.
//
//   here --commit--> handed-over --taken--> moved      handed-over --the target does not know it--> here

import { MIGRATE_ASK_MS, MIRROR_STALL_MS } from '../base/limits.ts'
import type { Layer } from '../block/device.ts'
import { BlockError } from '../block/error.ts'
import { StallFilter } from '../filter/stall.ts'
import type { Job } from '../job/job.ts'
import { type AwayMark, migrationNote } from './authority.ts'
import { BitmapSender, shapesOf } from './bitmap-transfer.ts'
import type { DiskRecord, JobRecord, MigrateSpec } from './catalog.ts'
import type { EngineContext, ManagedDisk } from './context.ts'
import { closeManagedDisk } from './disk-opener.ts'
import { ForwardLayer } from './forward-layer.ts'
import type { BitmapPiece, IncomingReply, IncomingStep, PeerLink } from './peers.ts'

/** What names a migration at its target. */
type Target = Pick<AwayMark, 'to' | 'token'> & { readonly home?: string }

/** One attempt; made anew with each run of the mirror. */
export class HandOver {
  readonly #context: EngineContext
  readonly #managed: ManagedDisk
  readonly #job: Job
  readonly #record: () => JobRecord
  #bits = new BitmapSender()
  /** What the other side expects bits of. */
  #shapes = ''
  /** The layers that the disk was on. */
  #left: readonly Layer[] = []

  constructor(context: EngineContext, managed: ManagedDisk, job: Job, record: () => JobRecord) {
    this.#context = context
    this.#managed = managed
    this.#job = job
    this.#record = record
  }

  /** Sends the bitmaps ahead, while the guest goes on. */
  async approach(): Promise<void> {
    const { bitmaps } = this.#managed.disk.log
    const shapes = shapesOf(bitmaps)
    if (this.#shapes !== JSON.stringify(shapes)) {
      this.#bits = new BitmapSender()
      await this.#step({ step: 'bits', anew: true, shapes, pieces: [] })
      this.#shapes = JSON.stringify(shapes)
    }
    for (const pieces of this.#bits.rest(bitmaps)) if (pieces.length > 0) await this.#send(pieces)
  }

  /** The disk is drained and the target has all of it, flushed: makes the bitmaps durable there. */
  async seal(): Promise<void> {
    const { disk, record } = this.#managed
    // Bitmaps may have been added or removed since.
    if (this.#shapes !== JSON.stringify(shapesOf(disk.log.bitmaps))) await this.approach()
    let last: readonly BitmapPiece[] = []
    for (const pieces of this.#bits.rest(disk.log.bitmaps)) {
      if (last.length > 0) await this.#send(last)
      last = pieces
    }
    const lost = record.bitmapsLost === undefined ? {} : { bitmapsLost: record.bitmapsLost }
    const shapes = shapesOf(disk.log.bitmaps)
    const { state } = await this.#step({ step: 'seal', shapes, pieces: last, ...lost })
    if (state !== 'sealed') throw new BlockError('protocol', `${this.#spec.to}: the copy is ${state}, and not sealed`)
  }

  /**
   * Gives the disk up, and returns when the target has it. Kind 'cancelled' when it turned out that it never will: the disk is here as
   * before; 'closed' when the daemon stops before it is known. The disk is drained all the while.
   */
  async run(link: PeerLink): Promise<void> {
    const { to, token, home = '', forward } = this.#spec
    const before = this.#managed.record
    const away: AwayMark = { state: 'handed-over', token, to, home, size: this.#managed.disk.size, forward }
    await this.#save({ ...before, away }, [])
    let isTaken: boolean
    try {
      isTaken = await askWhoHasIt(this.#context, this.#job, away)
    } catch (error) {
      // The daemon stops: what guests asked is asked again by them when it is known where.
      // Their connections are gone, and what was held fails: were it to wait, so would the mirror's end, and with it the daemon's.
      const nowhere = new ForwardLayer({ ...this.#forwardOptions(away), connect: () => new Promise(() => undefined) })
      this.#moveTo(nowhere)
      await nowhere.close()
      await this.#closeLeft()
      throw error
    }
    if (!isTaken) {
      await this.#save(before, [])
      throw neverTaken(away)
    }
    await this.#save({ ...before, away: { ...away, state: 'moved' } }, [this.#record().id])
    this.#moveTo(new ForwardLayer({ ...this.#forwardOptions(away), link: forward ? link : undefined }))
    this.#job.describe({ holds: forward ? 'the disk; its guests are passed on' : 'the disk' })
  }

  /** After `run`, with the guest going on: leaves the images clean, and closes a disk that is not passed on. */
  async finish(): Promise<void> {
    await this.#closeLeft()
    const { record } = this.#managed
    if (record.away === undefined || record.away.forward) return
    await leaveMoved(this.#context, this.#managed)
    await forget(this.#context, record)
  }

  get #spec(): MigrateSpec {
    return this.#record().spec as MigrateSpec
  }

  #step(step: IncomingStep): Promise<IncomingReply> {
    return askTarget(this.#context, this.#spec, step)
  }

  async #send(pieces: readonly BitmapPiece[]): Promise<void> {
    await this.#step({ step: 'bits', anew: false, shapes: [], pieces })
  }

  #forwardOptions(away: AwayMark): ConstructorParameters<typeof ForwardLayer>[0] {
    return forwardOptions(this.#context, this.#managed.record.name, away)
  }

  #moveTo(layer: ForwardLayer): void {
    const { away } = this.#managed.record
    if (away?.state !== 'moved' || !away.forward) this.#managed.served?.sever()
    const { chain } = this.#managed.disk
    this.#left = chain.layers
    chain.replaceLayers([layer])
  }

  async #closeLeft(): Promise<void> {
    const left = this.#left
    this.#left = []
    for (const layer of left.toReversed()) await layer.close()
  }

  async #save(record: DiskRecord, endedJobs: readonly string[]): Promise<void> {
    await this.#context.catalog.commit([
      { put: 'disk', record },
      ...endedJobs.map((id) => ({ remove: 'job' as const, id })),
    ])
    this.#managed.record = record
  }
}

/**
 * Asks the target to take the disk until it has answered: true when it has it, false when it does not know the token, or when an operator
 * takes the disk back without its word. Kind 'closed' when the daemon stops.
 */
export async function askWhoHasIt(context: EngineContext, job: Job, away: AwayMark): Promise<boolean> {
  for (;;) {
    if (job.suspended) throw new BlockError('closed', `job ${job.id} is suspended: the daemon stops`)
    if (context.takenBack.has(away.token)) return false
    try {
      return await askOnce(context, away)
    } catch (error) {
      job.describe({ waits: (error as Error).message })
      await job.idle(MIGRATE_ASK_MS)
    }
  }
}

/** The same, asked once; throws when there is no answer. */
export async function askOnce(context: EngineContext, away: AwayMark): Promise<boolean> {
  const { state } = await askTarget(context, away, { step: 'take' })
  if (state === 'taken' || state === 'unknown') return state === 'taken'
  throw new BlockError('protocol', `${away.to}: the copy is ${state}, which cannot be`)
}

/** Asks the target of a migration. Kind 'protocol' when another daemon than the one it began with answers. */
export async function askTarget(
  { peers }: EngineContext,
  { to, token, home }: Target,
  step: IncomingStep,
): Promise<IncomingReply> {
  const reply = await peers.step(to, token, step)
  if (home === undefined || reply.home === home) return reply
  const message = `at ${to} answers another daemon than the one that this migration began with: its answer means nothing`
  throw new BlockError('protocol', message)
}

/** The export of a migration's disk at its target; one that answers nothing is given up. */
export async function connectTarget({ peers }: EngineContext, { to, token }: Target): Promise<PeerLink> {
  const link = await peers.connect(to, token)
  const device = new StallFilter(link.device, MIRROR_STALL_MS, () => {
    const message = `${to} has not answered for ${MIRROR_STALL_MS / 1000} s`
    link.abandon(new BlockError('timeout', message, { device: link.device.name }))
  })
  return { device, lost: () => link.lost(), abandon: (error) => link.abandon(error) }
}

export function neverTaken({ to }: AwayMark): BlockError {
  return new BlockError('cancelled', `${to} has not taken the disk and cannot any more: it goes on here`)
}

/** How a disk that is away is reached. */
export function forwardOptions(
  context: EngineContext,
  name: string,
  away: AwayMark,
): ConstructorParameters<typeof ForwardLayer>[0] {
  const { to, size } = away
  return { name, to, size, connect: () => connectTarget(context, away), report: context.report }
}

/** Closes a disk that is not passed on: from here on only its record is here. */
async function leaveMoved(context: EngineContext, managed: ManagedDisk): Promise<void> {
  const { record } = managed
  try {
    await closeManagedDisk(context, managed)
  } finally {
    context.disks.delete(record.name)
    context.failed.set(record.name, { record, error: new BlockError('busy', migrationNote(record) ?? '') })
  }
}

/** Tells the target that nobody asks by the token any more. One that is away keeps it. */
export async function forget(context: EngineContext, { name, away }: DiskRecord): Promise<void> {
  if (away === undefined) return
  try {
    await askTarget(context, away, { step: 'release' })
  } catch (error) {
    const message = `${away.to} still remembers where disk ${name} came from: varve migrate ${name} --settle --force there ends that`
    context.report(`${message} (${(error as Error).message})`)
  }
}
