// qemu-io writes patterns to a disk that Varve serves, with snapshots, deletions, a commit, streams and reverts by the command line in between.
// At each step every pattern reads back, QEMU finds each image clean after a clean stop, and the disk and its snapshots are
// identical to a copy that qemu-io wrote by itself with the same commands and no snapshot.

import assert from 'node:assert/strict'
import fs from 'node:fs'
import path from 'node:path'
import { type TestContext, test } from 'node:test'
import type { DiskReply } from '../../src/api/schema.ts'
import { Random, seedOfRun } from '../../src/base/random.ts'
import { roundDown, roundUp } from '../../src/base/round.ts'
import { assertClean, startDaemon, type TestDaemon } from '../support/daemon.ts'
import { missing, peer } from '../support/peer.ts'

const KIB = 1024
const MIB = 1024 * KIB
const SIZE = 24 * MIB
const DISK = 'vm1'
/** Cluster of the overlays that Varve makes. */
const OVERLAY_CLUSTER = 64 * KIB

interface Base {
  readonly title: string
  readonly format: 'raw' | 'qcow2'
  /** Arguments of `qemu-img create`; without them Varve makes the image. */
  readonly create?: readonly string[]
  /** Bytes that discard as one: its cluster. */
  readonly cluster?: number
}

const BASES: readonly Base[] = [
  { title: 'a qcow2 image made by Varve', format: 'qcow2' },
  { title: 'a raw image', format: 'raw', create: [] },
  { title: 'a qcow2 image made by QEMU', format: 'qcow2', create: [] },
  { title: 'a qcow2 image with clusters of 4 KiB', format: 'qcow2', create: ['-o', 'cluster_size=4k'] },
  {
    title: 'a qcow2 image with clusters of 2 MiB',
    format: 'qcow2',
    create: ['-o', 'cluster_size=2M'],
    cluster: 2 * MIB,
  },
  {
    title: 'a qcow2 image with lazy refcounts and preallocated metadata',
    format: 'qcow2',
    create: ['-o', 'compat=1.1,lazy_refcounts=on,preallocation=metadata'],
  },
]

/** One change of the disk. A zero or discard leaves pattern 0. */
interface Step {
  readonly kind: 'write' | 'zero' | 'unmap' | 'discard'
  readonly offset: number
  readonly length: number
  readonly pattern: number
}

const COMMANDS: Record<Step['kind'], (step: Step) => string> = {
  write: ({ pattern, offset, length }) => `write -q -P ${pattern} ${offset} ${length}`,
  zero: ({ offset, length }) => `write -q -z ${offset} ${length}`,
  unmap: ({ offset, length }) => `write -q -z -u ${offset} ${length}`,
  discard: ({ offset, length }) => `discard -q ${offset} ${length}`,
}

/**
 * Overlapping changes of a byte to some MiB, most of them unaligned. The first is a write: a discard takes no space, so in an
 * overlay that has no table yet it does nothing.
 */
function makeSteps(random: Random, count: number, cluster: number): Step[] {
  const steps: Step[] = [{ kind: 'write', offset: random.below(SIZE), length: 1, pattern: random.between(1, 255) }]
  while (steps.length < count) {
    const longest = random.pick([1, 512, 5000, 100 * KIB, 3 * MIB])
    const length = random.between(1, longest)
    const offset = random.below(SIZE - length)
    const kind = random.pick(['write', 'write', 'write', 'zero', 'unmap', 'discard'] as const)
    if (kind !== 'discard') steps.push({ kind, offset, length, pattern: kind === 'write' ? random.between(1, 255) : 0 })
    else steps.push(...discardSteps(random, cluster))
  }
  return steps
}

/** What a discard does to parts of clusters is free, so they are written after it; the whole clusters inside read as zeros. */
function discardSteps(random: Random, cluster: number): Step[] {
  const length = random.between(2 * cluster, 4 * cluster)
  const offset = random.below(SIZE - length)
  const first = roundUp(offset, cluster)
  const last = roundDown(offset + length, cluster)
  const pattern = random.between(1, 255)
  const edges: Step[] = [
    { kind: 'write', offset, length: first - offset, pattern },
    { kind: 'write', offset: last, length: offset + length - last, pattern },
  ]
  return [{ kind: 'discard', offset, length, pattern: 0 }, ...edges.filter((edge) => edge.length > 0)]
}

function qemuIo(format: string, image: string, commands: readonly string[], ...options: string[]): void {
  peer('qemu-io', ...options, '-f', format, ...commands.flatMap((command) => ['-c', command]), image)
}

/** A disk of Varve and its twin: an image that only QEMU writes, with the same commands. */
class Twins {
  readonly #served: TestDaemon
  readonly #base: Base
  readonly #random: Random
  readonly #twin: string
  readonly #images: string
  readonly #content = new Uint8Array(SIZE)
  readonly #contents = new Map<string, Uint8Array>()
  #uri = ''

  private constructor(served: TestDaemon, base: Base, random: Random) {
    this.#served = served
    this.#base = base
    this.#random = random
    this.#twin = path.join(served.folder, 'twin')
    this.#images = path.join(served.folder, 'images')
  }

  static async make(served: TestDaemon, base: Base, random: Random): Promise<Twins> {
    const twins = new Twins(served, base, random)
    fs.mkdirSync(twins.#images)
    const image = path.join(twins.#images, 'disk')
    const create = (file: string): string =>
      peer('qemu-img', 'create', '-q', '-f', base.format, ...(base.create ?? []), file, String(SIZE))
    create(twins.#twin)
    if (base.create === undefined) {
      served.varve('disk', 'create', DISK, image, '-f', base.format, '--size', String(SIZE))
    } else {
      create(image)
      served.varve('disk', 'add', DISK, image, '-f', base.format)
    }
    twins.#uri = (await served.daemon.api.call('showDisk', { disk: DISK }, {})).uri ?? ''
    return twins
  }

  /** The same changes to both, and all of them read back. */
  write(): void {
    const cluster = Math.max(this.#base.cluster ?? 0, OVERLAY_CLUSTER)
    const steps = makeSteps(this.#random, 25, cluster)
    const commands = steps.map((step) => COMMANDS[step.kind](step))
    qemuIo('raw', this.#uri, commands, '-d', 'unmap')
    qemuIo(this.#base.format, this.#twin, commands, '-d', 'unmap')
    for (const { offset, length, pattern } of steps) this.#content.fill(pattern, offset, offset + length)
    this.readBack()
  }

  /** Every byte of the served disk has the pattern that was last written there. */
  readBack(): void {
    const commands: string[] = []
    for (let offset = 0; offset < SIZE; ) {
      const pattern = this.#content[offset] as number
      let end = offset + 1
      while (end < SIZE && this.#content[end] === pattern) end++
      commands.push(`read -q -P ${pattern} ${offset} ${end - offset}`)
      offset = end
    }
    qemuIo('raw', this.#uri, commands, '-r')
  }

  /** Freezes the disk and keeps a copy of the twin beside it. */
  snapshot(name: string): void {
    this.#served.varve('snapshot', 'create', DISK, name)
    this.#keep(name)
  }

  /** The disk is as a snapshot again, and the twin as its copy; with `keep` the present state becomes a snapshot. */
  revert(name: string, keep?: string): void {
    const fate = keep === undefined ? ['--discard'] : ['--keep-as', keep]
    this.#served.varve('snapshot', 'revert', DISK, name, '--yes', ...fate)
    if (keep !== undefined) this.#keep(keep)
    peer('cp', '--sparse=always', `${this.#twin}-${name}`, this.#twin)
    this.#content.set(this.#contents.get(name) as Uint8Array)
    this.readBack()
  }

  #keep(name: string): void {
    peer('cp', '--sparse=always', this.#twin, `${this.#twin}-${name}`)
    this.#contents.set(name, this.#content.slice())
  }

  /** The images of the disk from base to active. */
  async layers(): Promise<DiskReply['layers']> {
    return (await this.#served.daemon.api.call('showDisk', { disk: DISK }, {})).layers
  }

  async snapshots(): Promise<(string | undefined)[]> {
    return (await this.layers()).map(({ snapshot }) => snapshot?.name)
  }

  /** After a clean stop QEMU finds every image clean, and the disk and each snapshot equal to the twin of its time. */
  async check(note: string): Promise<void> {
    const layers = await this.layers()
    const snapshots = await this.#served.daemon.api.call('listSnapshots', { disk: DISK }, {})
    await this.#served.daemon.stop()
    const beside = snapshots.filter(({ inChain }) => !inChain)
    const images = [...layers, ...beside].map((layer) => layer.path)
    const files = fs.readdirSync(this.#images).map((name) => path.join(this.#images, name))
    // A base that Varve did not make stays where it is when a stream takes it out of the chain.
    const base = path.join(this.#images, 'disk')
    if (this.#base.create !== undefined && !images.includes(base)) images.push(base)
    assert.deepEqual(files.sort(), images.toSorted(), `${note}: no other file is left beside the images`)
    for (const { path: image, format, snapshot } of layers) {
      if (format === 'qcow2') assertClean(image, note)
      const isActive = image === layers.at(-1)?.path
      if (isActive) this.#compare(image, format, this.#twin)
      else if (snapshot !== undefined) this.#compare(image, format, `${this.#twin}-${snapshot.name}`)
    }
    for (const { path: image, name } of beside) {
      assertClean(image, note)
      this.#compare(image, 'qcow2', `${this.#twin}-${name}`)
    }
    await this.#served.daemon.start()
    this.readBack()
  }

  #compare(image: string, format: string, twin: string): void {
    peer('qemu-img', 'compare', '-q', '-f', format, '-F', this.#base.format, image, twin)
  }
}

/** The middle of a chain goes up, and then all of it: QEMU finds the images alone equal. */
async function runStreams(served: TestDaemon, twins: Twins): Promise<void> {
  for (const name of ['four', 'five', 'six']) {
    twins.snapshot(name)
    twins.write()
  }
  served.varve('stream', DISK, '--base', 'four', '--to', 'six', '--yes')
  twins.readBack()
  assert.deepEqual(await twins.snapshots(), ['four', 'six', undefined])
  await twins.check('after the middle snapshot was pulled up')
  twins.write()
  served.varve('stream', DISK, '--yes')
  twins.readBack()
  assert.deepEqual(await twins.snapshots(), [undefined])
  await twins.check('after all was pulled up')
}

/** Back to a snapshot, and forward again to what was kept; then what is beside the chain goes. */
async function runRevert(twins: Twins): Promise<void> {
  twins.snapshot('seven')
  twins.write()
  twins.revert('seven', 'eight')
  twins.write()
  await twins.check('after the revert')
  twins.revert('eight')
  await twins.check('after the revert to what was kept')
}

async function runBase(t: TestContext, base: Base): Promise<void> {
  const random = new Random(seedOfRun())
  t.diagnostic(`VARVE_SEED=${random.seed}`)
  const served = await startDaemon(t)
  const twins = await Twins.make(served, base, random)
  twins.write()
  twins.snapshot('one')
  twins.write()
  await twins.check('after the first snapshot')
  twins.snapshot('two')
  twins.write()
  twins.snapshot('three')
  twins.write()
  await twins.check('after the third snapshot')
  assert.deepEqual(await twins.snapshots(), ['one', 'two', 'three', undefined])

  served.varve('snapshot', 'delete', DISK, 'two')
  twins.readBack()
  assert.deepEqual(await twins.snapshots(), ['one', 'three', undefined])
  await twins.check('after the middle snapshot was deleted')
  twins.write()

  served.varve('commit', DISK, '--yes')
  twins.readBack()
  assert.deepEqual(await twins.snapshots(), [undefined])
  await twins.check('after the commit')
  twins.write()
  await twins.check('after more writes to the merged image')
  await runStreams(served, twins)
  await runRevert(twins)
}

for (const base of BASES) {
  test(
    `patterns of qemu-io live through snapshots, a deletion, a commit, streams and reverts on ${base.title}`,
    {
      skip: missing('qemu-io', 'qemu-img'),
      timeout: 120_000,
    },
    (t) => runBase(t, base),
  )
}
