// Live commit, stream and mirror by two programs on the same images: a process that serves the disk, told to do one job on it,
// which ends with the disk going on at its new place and all of it on the disk.

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
  readonly serve: (job: LiveJob, stage: Stage) => Promise<Served>
}

/** Images full of random data, made once: a base, and an overlay that holds all of the disk, too. */
export class Images {
  readonly #folder: string
  readonly #base: string
  readonly #full: string

  constructor(folder: string, sizeMiB: number) {
    this.#folder = folder
    this.#base = path.join(folder, 'base.qcow2')
    this.#full = path.join(folder, 'full.qcow2')
    for (const image of [this.#base, this.#full]) makeImage(image, 'qcow2', sizeMiB)
    check('qemu-img', 'rebase', '-u', '-f', 'qcow2', '-b', path.basename(this.#base), '-F', 'qcow2', this.#full)
  }

  /** What a job begins with, in the page cache and clean. */
  prepare(job: LiveJob): Stage {
    const overlay = path.join(this.#folder, 'overlay.qcow2')
    const target = path.join(this.#folder, 'target.qcow2')
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
  serve: async (job, stage) => {
    const daemon = await startDaemon(stage.folder)
    try {
      const uri = await addDisk(daemon, stage.active, 'qcow2')
      const [on] = await daemon.api.call('listDisks', {}, {})
      const disk = { disk: on?.name ?? '' }
      const begin = {
        commit: () => daemon.api.call('commit', disk, {}),
        stream: () => daemon.api.call('stream', disk, {}),
        mirror: () => daemon.api.call('mirror', disk, { target: stage.target, format: 'qcow2', finish: 'pivot' }),
      }[job]
      const work = async (): Promise<void> => {
        const { id } = await begin()
        const { error } = await daemon.api.follow(id, () => undefined)
        if (error !== undefined) throw new Error(`${job}: ${error.message}`)
        sync(stage.result)
      }
      return { pid: daemon.pid, stop: () => daemon.stop(), uri, work }
    } catch (error) {
      await daemon.stop()
      throw error
    }
  },
}

/** The chain as nodes of their own, the base first; over io_uring, as the server of the other parts. */
function chainOptions(stage: Stage): string[] {
  const file = (name: string, image: string): string[] => [
    '--blockdev',
    `driver=file,node-name=${name}-file,filename=${image},aio=io_uring,discard=unmap`,
  ]
  const isChain = stage.active !== stage.base
  const base = [...file('base', stage.base), '--blockdev', 'driver=qcow2,node-name=base,file=base-file,discard=unmap']
  if (!isChain) return base
  const overlay = 'driver=qcow2,node-name=overlay,file=overlay-file,backing=base,discard=unmap'
  return [...base, ...file('overlay', stage.active), '--blockdev', overlay]
}

export const STORAGE_DAEMON_JOBS: Rival = {
  program: STORAGE_DAEMON.name,
  version: STORAGE_DAEMON.version,
  serve: async (job, stage) => {
    const [nbd, monitor] = ['nbd', 'qmp'].map((name) => path.join(stage.folder, `${name}.sock`)) as [string, string]
    const node = stage.active === stage.base ? 'base' : 'overlay'
    const running = await startProcess(
      [
        'qemu-storage-daemon',
        '--chardev',
        `socket,id=qmp,path=${monitor},server=on,wait=off`,
        '--monitor',
        'chardev=qmp',
        '--nbd-server',
        `addr.type=unix,addr.path=${nbd}`,
        ...chainOptions(stage),
        '--export',
        `type=nbd,id=disk,node-name=${node},name=disk,writable=on`,
      ],
      () => answers({ path: nbd }),
    )
    const qmp = await Qmp.connect(monitor)
    const work = async (): Promise<void> => {
      const kept = { 'job-id': 'job', 'auto-dismiss': false }
      if (job === 'commit') await qmp.execute('block-commit', { ...kept, device: node })
      if (job === 'stream') await qmp.execute('block-stream', { ...kept, device: node })
      if (job === 'mirror') {
        const target = await addTarget(qmp, stage)
        await qmp.execute('blockdev-mirror', { ...kept, device: node, target, sync: 'full' })
      }
      await qmp.jobEnded('job')
      sync(stage.result)
    }
    const stop = async (): Promise<void> => {
      qmp.close()
      await running.stop()
    }
    return { pid: running.pid, stop, uri: `nbd+unix:///disk?socket=${nbd}`, work }
  },
}

/** Makes the image of a mirror's target and opens it; its node's name. Part of the job, as it is with Varve. */
async function addTarget(qmp: Qmp, stage: Stage): Promise<string> {
  const { 'virtual-size': size } = JSON.parse(
    check('qemu-img', 'info', '--force-share', '--output=json', stage.active),
  ) as { 'virtual-size': number }
  check('qemu-img', 'create', '-q', '-f', 'qcow2', stage.target, `${size / MIB}M`)
  const file = { driver: 'file', filename: stage.target, aio: 'io_uring', discard: 'unmap' }
  await qmp.execute('blockdev-add', { driver: 'qcow2', 'node-name': 'target', file, discard: 'unmap' })
  return 'target'
}
