// varve demo: the main job on a real image, under a verifying load for the whole time. Full backup, live snapshot, incremental,
// live merge, kill -9 of the daemon in the middle of it, restart, the merge goes on, a second incremental that still is one, and
// every backup restored and compared, and a file taken out of one. Needs no root and leaves nothing behind unless told to.

import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import type { JobReply } from '../../api/schema.ts'
import { formatSize } from '../../base/size.ts'
import type { BlockDevice } from '../../block/device.ts'
import { BlockError } from '../../block/error.ts'
import { openLayer } from '../../chain/open.ts'
import { ExtFileSystem } from '../../format/ext/ext-file-system.ts'
import { initRepositoryAt, openRepositoryAt } from '../../shard/repositories.ts'
import { realHost } from '../../host/real.ts'
import { restoreToImage } from '../restore-image.ts'
import { ChildDaemon } from './child-daemon.ts'
import { type DemoImage, makeImage } from './image.ts'
import { Load } from './load.ts'
import { checkFileSystem, checkImage, compareImages } from './peers.ts'
import { type Phase, phaseTable, Timeline } from './timeline.ts'
import { type Bounds, findDifferences } from './verify.ts'

const DISK = 'vm1'
const SEED = 20_111
const MIB = 1024 * 1024
/** The merge is slowed down so that the kill lands in its middle. */
const MERGE_SPEED = 24 * MIB
const KILL_AT = 0.5
const CALM_MS = 2000

export interface DemoOptions {
  readonly json: boolean
  readonly keep?: string
}

interface Taken {
  readonly title: string
  readonly id: string
  readonly kind: string
  readonly bounds: Bounds
  readonly readBytes: number
  readonly storedBytes: number
}

/** Returns the exit status: 0 when everything compared equal. */
export async function runDemo(options: DemoOptions): Promise<number> {
  const timeline = new Timeline(options.json)
  const folder =
    options.keep === undefined ? fs.mkdtempSync(path.join(os.tmpdir(), 'varve-demo-')) : path.resolve(options.keep)
  if (options.keep !== undefined) fs.mkdirSync(folder, { recursive: true })
  const demo = new Demo(folder, timeline)
  try {
    await demo.run()
    const failed = demo.failures.length > 0
    const verdict = failed ? `demo: ${demo.failures.length} comparisons failed` : 'demo: everything compared equal'
    if (options.json) process.stdout.write(`${JSON.stringify(demo.report(verdict), undefined, 2)}\n`)
    else process.stdout.write(`\n${phaseTable(demo.phases)}\n\n${[...demo.failures, verdict].join('\n')}\n`)
    return failed ? 1 : 0
  } finally {
    await demo.end()
    if (options.keep === undefined) fs.rmSync(folder, { recursive: true, force: true })
    else timeline.say(`all files are in ${folder}`)
  }
}

class Demo {
  readonly phases: Phase[] = []
  readonly failures: string[] = []
  readonly #folder: string
  readonly #timeline: Timeline
  readonly #daemon: ChildDaemon
  readonly #repository: string
  readonly #disk: string
  #image: DemoImage | undefined
  #load: Load | undefined
  #uri = ''
  readonly #taken: Taken[] = []
  #merge: { killedAt: number; resumedAt: number; total: number } | undefined

  constructor(folder: string, timeline: Timeline) {
    this.#folder = folder
    this.#timeline = timeline
    this.#repository = path.join(folder, 'repository')
    this.#disk = path.join(folder, 'vm1.qcow2')
    this.#daemon = new ChildDaemon(path.join(folder, 'home'), path.join(folder, 'daemon.log'))
  }

  async run(): Promise<void> {
    const image = await this.#prepare()
    const load = await Load.connect(this.#uri, image.blocks, SEED)
    this.#load = load
    load.start()
    await this.#calm('load alone')
    await this.#backup('full backup')
    await this.#snapshot()
    await load.sweep()
    await this.#calm('load on the overlay')
    await this.#backup('incremental 1')
    await this.#mergeThroughKill()
    await this.#calm('load after the merge')
    await this.#backup('incremental 2')
    await load.stop()
    await this.#backup('last, at rest')
    await load.close()
    await this.#daemon.stop()
    this.#timeline.say('the daemon ended cleanly')
    await this.#prove(image)
  }

  async end(): Promise<void> {
    await this.#load?.close().catch(() => undefined)
    await this.#daemon.kill()
  }

  report(verdict: string): unknown {
    const backups = this.#taken.map(({ bounds: _bounds, ...rest }) => rest)
    return { verdict, phases: this.phases, merge: this.#merge, backups, failures: this.failures }
  }

  async #prepare(): Promise<DemoImage> {
    const image = makeImage(this.#folder)
    this.#image = image
    this.#timeline.say(`disk: ${image.description}`)
    const raw = await openLayer(realHost, image.path, 'raw', 'demo')
    await restoreToImage(raw, this.#disk, 'qcow2', () => undefined)
    await raw.close()
    await (await initRepositoryAt(this.#repository)).close()
    await this.#daemon.start()
    const disk = await this.#daemon.api.call('addDisk', {}, { name: DISK, image: this.#disk, format: 'qcow2' })
    this.#uri = disk.uri ?? ''
    this.#timeline.say(`served as ${this.#uri}`)
    return image
  }

  async #calm(name: string): Promise<void> {
    await new Promise((resolve) => setTimeout(resolve, CALM_MS))
    this.#endPhase(name)
  }

  #endPhase(name: string, more: Partial<Phase> = {}): void {
    const figures = (this.#load as Load).phase()
    this.phases.push({ name, ...figures, ...more })
    if (!(this.#load as Load).isRunning) return
    this.#timeline.say(
      `${name}: load at ${figures.perSecond.toFixed(0)} operations/s, p99 ${figures.p99Ms.toFixed(2)} ms`,
    )
  }

  async #backup(title: string): Promise<void> {
    const load = this.#load as Load
    const oldest = load.acknowledged()
    const body = { disks: [DISK], repository: this.#repository }
    const started = await this.#daemon.api.call('backup', {}, body)
    const newest = load.issued()
    const ended = await this.#follow(started, title)
    const { details } = ended
    const [plan] = details['disks'] as { kind: string; reason: string }[]
    const readBytes = Number(details['readBytes'])
    const storedBytes = Number(details['storedBytes'])
    const share = ((readBytes / (this.#image as DemoImage).size) * 100).toFixed(1)
    this.#timeline.say(
      `${title}: ${plan?.kind} (${plan?.reason}), read ${formatSize(readBytes)} = ${share} % of the disk, stored ${formatSize(storedBytes)}`,
    )
    const id = String(details['backup'])
    this.#taken.push({ title, id, kind: plan?.kind ?? '', bounds: { oldest, newest }, readBytes, storedBytes })
    const expected = title === 'full backup' ? 'full' : 'incremental'
    if (plan?.kind !== expected) this.failures.push(`${title} was ${plan?.kind}: ${plan?.reason}`)
    this.#endPhase(title, { copiedBytes: readBytes, scratchPeak: Number(details['scratchPeak'] ?? 0), storedBytes })
  }

  async #snapshot(): Promise<void> {
    const start = performance.now()
    await this.#daemon.api.call('createSnapshot', { disk: DISK }, { name: 'before' })
    this.#timeline.say(`live snapshot in ${(performance.now() - start).toFixed(1)} ms`)
    this.#endPhase('live snapshot')
  }

  async #mergeThroughKill(): Promise<void> {
    const { api } = this.#daemon
    const job = await api.call('commit', { disk: DISK }, { speed: MERGE_SPEED })
    const killed = await this.#waitFor(job.id, ({ done, total }) => total > 0 && done >= total * KILL_AT)
    await this.#daemon.kill()
    this.#timeline.say(
      `kill -9 of the daemon: the merge had copied ${formatSize(killed.done)} of ${formatSize(killed.total)}`,
    )
    this.#endPhase('live merge')
    await this.#daemon.start()
    const resumed = await this.#waitFor(job.id, ({ total }) => total > 0)
    this.#merge = { killedAt: killed.done, resumedAt: resumed.resumedAt, total: resumed.total }
    this.#timeline.say(
      `started again: the merge goes on from ${formatSize(resumed.resumedAt)} of ${formatSize(resumed.total)}`,
    )
    if (resumed.resumedAt === 0) this.failures.push('the merge began from nothing after the kill')
    const ended = await this.#follow(resumed, 'merge, resumed')
    this.#endPhase('merge, killed and resumed', { copiedBytes: ended.total - resumed.resumedAt })
    const { layers } = await api.call('showDisk', { disk: DISK }, {})
    if (layers.length !== 1) this.failures.push(`after the merge the disk has ${layers.length} layers, not 1`)
  }

  async #waitFor(id: string, test: (status: JobReply) => boolean): Promise<JobReply> {
    for (;;) {
      const status = await this.#daemon.api.call('showJob', { job: id }, {})
      if (status.error !== undefined) throw new BlockError('io', `job ${id} failed: ${status.error.message}`)
      if (status.endedMs !== undefined || test(status)) return status
      await new Promise((resolve) => setTimeout(resolve, 20))
    }
  }

  async #follow(job: JobReply, title: string): Promise<JobReply> {
    const bar = this.#timeline.bar(title)
    try {
      const ended = await this.#daemon.api.follow(job.id, ({ done, total }) => bar.update(done, total))
      if (ended.error === undefined) return ended
      throw new BlockError('io', `${title} failed: ${ended.error.message}`)
    } finally {
      bar.end()
    }
  }

  /** Restores every backup and compares it; checks the disk's own image. */
  async #prove(image: DemoImage): Promise<void> {
    const repository = await openRepositoryAt(this.#repository)
    let last = ''
    try {
      for (const [number, taken] of this.#taken.entries()) {
        last = path.join(this.#folder, `restored-${number + 1}.raw`)
        const reader = await repository.openBackup(taken.id)
        const bar = this.#timeline.bar(`restore ${taken.title}`)
        const device = reader.disks[0]?.device
        if (device === undefined) throw new BlockError('corrupt', `backup ${taken.id} has no disk`)
        const bytes = await restoreToImage(device, last, 'raw', (done, total) => bar.update(done, total))
        bar.end()
        await reader.close()
        await this.#compare(taken, last, image, bytes)
      }
    } finally {
      await repository.close()
    }
    if (image.sample !== undefined) await this.#takeFile(image.sample)
    this.#note('the disk’s image', checkImage(this.#disk))
    this.#note('the disk’s image beside the last restore', compareImages(this.#disk, last))
  }

  async #compare(taken: Taken, restored: string, image: DemoImage, bytes: number): Promise<void> {
    const layer = await openLayer(realHost, restored, 'raw', 'restored')
    const differences = await findDifferences(layer, image, taken.bounds)
    await layer.close()
    const verdict = differences.length === 0 ? 'equal to the journal' : 'DIFFERENT'
    this.#timeline.say(`${taken.title} restored: ${formatSize(bytes)}, ${verdict}`)
    this.failures.push(...differences.map((difference) => `${taken.title}: ${difference}`))
    if (image.fileSystem === 'ext4') this.#note(`${taken.title} restored`, checkFileSystem(restored))
  }

  /** Takes a file out of the last backup, as `varve files get` does, and compares it with the one that it is a copy of. */
  async #takeFile(file: string): Promise<void> {
    const start = performance.now()
    const repository = await openRepositoryAt(this.#repository)
    const reader = await repository.openBackup(this.#taken.at(-1)?.id ?? '')
    const parts: Uint8Array[] = []
    try {
      const system = await ExtFileSystem.open(reader.disks[0]?.device as BlockDevice)
      for await (const { bytes, length } of system.read(await system.find(file)))
        parts.push(bytes ?? Buffer.alloc(length))
    } finally {
      await reader.close()
      await repository.close()
    }
    const found = Buffer.concat(parts)
    const verdict = found.equals(fs.readFileSync(file)) ? 'equal to the original' : 'DIFFERENT'
    const took = `${formatSize(found.length)} in ${(performance.now() - start).toFixed(0)} ms, nothing mounted`
    this.#timeline.say(`${file} out of the last backup: ${took}, ${verdict}`)
    if (verdict === 'DIFFERENT') this.failures.push(`${file} out of the last backup differs`)
  }

  /** One finding of a peer program; undefined means that it is not installed. */
  #note(what: string, finding: { readonly good: boolean; readonly text: string } | undefined): void {
    if (finding === undefined) return
    this.#timeline.say(`${what}: ${finding.text}`)
    if (!finding.good) this.failures.push(`${what}: ${finding.text}`)
  }
}
