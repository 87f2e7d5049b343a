// Live commit, stream and mirror by two programs on the same images: a process that serves the disk, told to do one job on it,
// which ends with the disk going on at its new place and all of it on the disk. It may have done the same on a small disk first, as a
// daemon has that runs for weeks.

import fs from 'node:fs'
import path from 'node:path'
import { addDisk, startDaemon } from './daemon.ts'
import { makeImage, settle, sync } from './images.ts'
import { check, MIB } from './machine.ts'
import { answers, type RunningProcess, startProcess } from './process.ts'
import { Qmp } from './qmp.ts'
import { STORAGE_DAEMON } from './servers.ts'

export const LIVE_JOBS = ['commit', 'stream', 'mirror'] as const
export type LiveJob = (typeof LIVE_JOBS)[number]

/** Files of one measurement. */
export interface Stage {
  /** Of this measurement alone, for sockets and the daemon's home. */
  readonly folder: string
  readonly base: string
  /** The disk's image: an overlay, but for the mirror. */
  readonly active: string
  /** Of the mirror. */
  readonly target: string
  /** Where the data is in the end. */
  readonly result: string
}

export interface Served extends RunningProcess {
  readonly uri: string
  /** Does the job; resolves when it is over. */
  readonly work: () => Promise<void>
}

export interface Rival {
  readonly program: string
  readonly version: () => string | undefined
  /** Serves the disk; when there is another to do first, it is done by then. */
  readonly serve: (job: LiveJob, stage: Stage, first?: Stage) => Promise<Served>
}

/** Images full of random data, made once: a base, and an overlay that holds all of the disk, too. */
export class Images {
  readonly #folder: string
  readonly #prefix: string
  readonly #base: string
  readonly #full: string

  /** The names of the files begin with `prefix`. */
  constructor(folder: string, sizeMiB: number, prefix = '') {
    this.#folder = folder
    this.#prefix = prefix
    this.#base = path.join(folder, `${prefix}base.qcow2`)
    this.#full = path.join(folder, `${prefix}full.qcow2`)
    for (const image of [this.#base, this.#full]) makeImage(image, 'qcow2', sizeMiB)
    check('qemu-img', 'rebase', '-u', '-f', 'qcow2', '-b', path.basename(this.#base), '-F', 'qcow2', this.#full)
  }

  /** What a job begins with, in the page cache and clean. */
  prepare(job: LiveJob): Stage {
    const overlay = path.join(this.#folder, `${this.#prefix}overlay.qcow2`)
    const target = path.join(this.#folder, `${this.#prefix}target.qcow2`)
    if (job === 'commit') fs.copyFileSync(this.#full, overlay)
    const backing = path.basename(this.#base)
    if (job === 'stream') check('qemu-img', 'create', '-q', '-f', 'qcow2', '-b', backing, '-F', 'qcow2', overlay)
    const active = job === 'mirror' ? this.#base : overlay
    for (const image of new Set([this.#base, active])) settle(image, true)
    const result = { commit: this.#base, stream: overlay, mirror: target }[job]
    return { folder: fs.mkdtempSync(path.join(this.#folder, 'run-')), base: this.#base, active, target, result }
  }

  /** Whatever the job has left, but for what all share. */
  discard(stage: Stage): void {
    fs.rmSync(stage.folder, { recursive: true })
    for (const image of [stage.active, stage.target]) if (image !== this.#base) fs.rmSync(image, { force: true })
  }
}

export const VARVE_JOBS: Rival = {
  program: 'varve serve',
  version: () => `Node ${process.version}`,
  serve: async (job, stage, first) => {
    const daemon = await startDaemon(stage.folder)
    const workOn = async (disk: string, { target, result }: Stage): Promise<void> => {
      const begin = {
        commit: () => daemon.api.call('commit', { disk }, {}),
        stream: () => daemon.api.call('stream', { disk }, {}),
        mirror: () => daemon.api.call('mirror', { disk }, { target, format: 'qcow2', finish: 'pivot' }),
      }[job]
      const { id } = await begin()
      const { error } = await daemon.api.follow(id, () => undefined)
      if (error !== undefined) throw new Error(`${job}: ${error.message}`)
      sync(result)
    }
    const nameOf = ({ active }: Stage): string => `disk-${path.parse(active).name}`
    try {
      if (first !== undefined) {
        await addDisk(daemon, first.active, 'qcow2')
        await workOn(nameOf(first), first)
      }
      const uri = await addDisk(daemon, stage.active, 'qcow2')
      return { pid: daemon.pid, stop: () => daemon.stop(), uri, work: () => workOn(nameOf(stage), stage) }
    } catch (error) {
      await daemon.stop()
      throw error
    }
  },
}

/** The chain as nodes of their own, the base first, and what the node of the disk is called; over io_uring, as the server of the other parts. */
function chainOf(stage: Stage, prefix: string): { node: string; options: string[] } {
  const [base, overlay] = [`${prefix}base`, `${prefix}overlay`]
  const image = (name: string, filename: string, backing = ''): string[] => [
    '--blockdev',
    `driver=file,node-name=${name}-file,filename=${filename},aio=io_uring,discard=unmap`,
    '--blockdev',
    `driver=qcow2,node-name=${name},file=${name}-file,discard=unmap${backing}`,
  ]
  const below = image(base, stage.base)
  if (stage.active === stage.base) return { node: base, options: below }
  return { node: overlay, options: [...below, ...image(overlay, stage.active, `,backing=${base}`)] }
}

export const STORAGE_DAEMON_JOBS: Rival = {
  program: STORAGE_DAEMON.name,
  version: STORAGE_DAEMON.version,
  serve: async (job, stage, first) => {
    const [nbd, monitor] = ['nbd', 'qmp'].map((name) => path.join(stage.folder, `${name}.sock`)) as [string, string]
    const { node, options } = chainOf(stage, '')
    const firstChain = first === undefined ? undefined : chainOf(first, 'first-')
    const running = await startProcess(
      [
        'qemu-storage-daemon',
        '--chardev',
        `socket,id=qmp,path=${monitor},server=on,wait=off`,
        '--monitor',
        'chardev=qmp',
        '--nbd-server',
        `addr.type=unix,addr.path=${nbd}`,
        ...options,
        ...(firstChain?.options ?? []),
        '--export',
        `type=nbd,id=disk,node-name=${node},name=disk,writable=on`,
      ],
      () => answers({ path: nbd }),
    )
    const qmp = await Qmp.connect(monitor)
    const workOn = async (device: string, on: Stage, prefix: string): Promise<void> => {
      const id = `${prefix}job`
      const kept = { 'job-id': id, device, 'auto-dismiss': false }
      if (job === 'commit') await qmp.execute('block-commit', kept)
      if (job === 'stream') await qmp.execute('block-stream', kept)
      if (job === 'mirror') {
        const target = await addTarget(qmp, on, `${prefix}target`)
        await qmp.execute('blockdev-mirror', { ...kept, target, sync: 'full' })
      }
      await qmp.jobEnded(id)
      sync(on.result)
    }
    const stop = async (): Promise<void> => {
      qmp.close()
      await running.stop()
    }
    try {
      if (first !== undefined && firstChain !== undefined) await workOn(firstChain.node, first, 'first-')
    } catch (error) {
      await stop()
      throw error
    }
    return { pid: running.pid, stop, uri: `nbd+unix:///disk?socket=${nbd}`, work: () => workOn(node, stage, '') }
  },
}

/** Makes the image of a mirror's target and opens it; its node's name. Part of the job, as it is with Varve. */
async function addTarget(qmp: Qmp, stage: Stage, node: string): Promise<string> {
  const { 'virtual-size': size } = JSON.parse(
    check('qemu-img', 'info', '--force-share', '--output=json', stage.active),
  ) as { 'virtual-size': number }
  check('qemu-img', 'create', '-q', '-f', 'qcow2', stage.target, `${size / MIB}M`)
  const file = { driver: 'file', filename: stage.target, aio: 'io_uring', discard: 'unmap' }
  await qmp.execute('blockdev-add', { driver: 'qcow2', 'node-name': node, file, discard: 'unmap' })
  return node
}
