// What QEMU itself does with a disk of a machine of its own (own-jobs.ts), as a job of ours: with a row in the catalog, progress, verbs and history. QEMU
// does the work; while it does, the job has its monitor. When the daemon stops or dies QEMU goes on, and the next start finds its job
// by the name; when QEMU dies its job is lost with it, and the image as good as before.

import { BlockError, toBlockError } from '../block/error.ts'
import type { Format } from '../chain/open.ts'
import type { Job, JobStatus } from '../job/job.ts'
import type { VmJobKind } from '../job/terms.ts'
import { disksOf, readGraph } from '../source/qemu/block-graph.ts'
import { type DiskInUse, pick } from '../source/qemu/disk-in-use.ts'
import { removeMoves } from '../source/qemu/move-disk.ts'
import { type OwnJobKind, ownJobId, runOwnJob } from '../source/qemu/own-jobs.ts'
import type { QmpClient } from '../source/qemu/qmp-client.ts'
import type { JobRecord, VmJobSpec } from './catalog.ts'
import type { EngineContext } from './context.ts'
import { JobTable } from './job-table.ts'
import { makeImage } from './new-disk.ts'
import { isDomain, isVmJob, type QemuMachineRecord, refuseBusy, tidyQemu, vmOf, withQemu } from './qemu-contact.ts'

export interface VmJobRequest {
  readonly machine: string
  readonly kind: VmJobKind
  readonly disk: string
  /** Bytes per second; 0 is no limit. */
  readonly speed: number
  /** Of a mirror: the image that is made. */
  readonly target?: { readonly file: string; readonly format: Format } | undefined
}

const OWN: Readonly<Record<VmJobKind, OwnJobKind>> = {
  'vm-commit': 'commit',
  'vm-stream': 'stream',
  'vm-mirror': 'mirror',
}

/**
 * Begins it; one of that kind that is at the disk is gone on with. Kinds 'not-found' for a machine or disk that is not there, 'unsupported' for one of
 * libvirt's or that the guest cannot write, 'busy' while another job is at the machine, 'exists' for an image that is there, and of reaching QEMU.
 */
export async function startVmJob(context: EngineContext, request: VmJobRequest): Promise<JobStatus> {
  const { machine, kind, disk, speed, target } = request
  const record = machineOf(context, machine)
  const same = context.jobs.find(
    ({ spec }) => isVmJob(spec) && spec.kind === kind && spec.machine === machine && spec.disk === disk,
  )
  if (same !== undefined && target === undefined) return context.jobs.setSpeed(same.id, speed)
  refuseBusy(context.catalog, machine)
  if ((kind === 'vm-mirror') !== (target !== undefined))
    throw new BlockError('invalid-argument', 'a mirror has a target, and nothing else has')
  const { size } = await withQemu(record, async (client) => {
    await tidyQemu(client, record, context.home)
    await removeMoves(client)
    return diskIn(client, record, disk)
  })
  if (target !== undefined) await makeImage(context, target.file, target.format, size)
  const spec: VmJobSpec = { kind, disks: [], machine, disk, ...(target && { target }) }
  const row = JobTable.newRow(spec, { speed })
  try {
    await context.catalog.commit([{ put: 'job', record: row }])
  } catch (error) {
    if (target !== undefined) await context.host.unlink(target.file)
    throw error
  }
  return launchVmJob(context, row, false).status
}

/** Of a new row, or `isAgain` of one that a restart found. */
export function launchVmJob(context: EngineContext, row: JobRecord, isAgain = true): Job {
  const spec = row.spec as VmJobSpec
  const job = JobTable.jobOf(row, { disk: spec.disk })
  context.jobs.launch(job, row, async () => {
    try {
      await withQemu(machineOf(context, spec.machine), (client) => work(context, job, client, spec, isAgain))
    } catch (error) {
      if (!job.suspended && spec.target !== undefined) await context.host.unlink(spec.target.file)
      throw explained(toBlockError(error, `machine ${spec.machine}`), spec)
    }
    await job.pausePoint(0)
    job.move('finalizing')
  })
  return job
}

async function work(
  context: EngineContext,
  job: Job,
  client: QmpClient,
  spec: VmJobSpec,
  isAgain: boolean,
): Promise<void> {
  const { kind, disk, target } = spec
  const record = machineOf(context, spec.machine)
  const { top } = await diskIn(client, record, disk)
  const { speed } = job.status
  const own = { kind: OWN[kind], disk }
  const watch = watchOf(job, client, ownJobId(own))
  await runOwnJob(client, {
    ...own,
    top,
    speed,
    isAgain,
    ...(target && { target: { driver: target.format, file: { driver: 'file', filename: target.file } } }),
    isLeft: () => job.suspended,
    ...watch,
  })
  job.describe({ image: target?.file ?? (await diskIn(client, record, disk)).file })
}

/** Tells the job how far QEMU is, and QEMU what was said to the job. */
function watchOf(
  job: Job,
  client: QmpClient,
  id: string,
): { readonly progress: (done: number, total: number) => Promise<void>; readonly signal: AbortSignal } {
  let { speed } = job.status
  let isPaused = false
  const progress = async (done: number, total: number): Promise<void> => {
    if (job.suspended) throw new BlockError('closed', 'the daemon stops, and QEMU goes on by itself')
    if (job.state === 'aborting') throw job.error ?? new BlockError('cancelled', `job ${job.id} was cancelled`)
    job.advance(Math.max(0, done - job.status.done), Math.max(0, total - done))
    const wanted = { speed: job.status.speed, isPaused: job.state === 'paused' }
    if (wanted.speed !== speed) await client.execute('block-job-set-speed', { device: id, speed: wanted.speed })
    if (wanted.isPaused !== isPaused)
      await client.execute(wanted.isPaused ? 'block-job-pause' : 'block-job-resume', { device: id })
    ;({ speed, isPaused } = wanted)
  }
  return { progress, signal: new AbortController().signal }
}

function machineOf({ catalog }: EngineContext, machine: string): QemuMachineRecord {
  const record = vmOf(catalog, machine)
  if (record === undefined)
    throw new BlockError('not-found', `there is no machine ${machine} of QEMU's: varve vm list shows those there are`)
  if (!isDomain(record)) return record
  const { connect } = record.qemu
  const message = `${machine} is a machine of libvirt’s, which would not know of what is done to its disks`
  throw new BlockError('unsupported', `${message}: virsh -c ${connect} blockcopy, blockcommit and blockpull do it`)
}

async function diskIn(client: QmpClient, { id, qemu }: QemuMachineRecord, disk: string): Promise<DiskInUse> {
  return pick(id, disksOf(await readGraph(client), qemu.tag), disk)
}

/** What it means that QEMU was lost. */
function explained(error: BlockError, { kind, machine, disk }: VmJobSpec): BlockError {
  if (error.kind !== 'closed' && error.kind !== 'not-found') return error
  const own = OWN[kind]
  const what =
    own === 'mirror'
      ? 'the copy was not whole, and is removed'
      : `nothing is lost: start the machine with the layers it had, and then varve vm ${own} ${machine} ${disk} again`
  return new BlockError(error.kind, `${error.message}; ${what}`, {}, error)
}
