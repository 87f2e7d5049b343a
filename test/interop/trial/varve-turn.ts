// Varve's turn on the image of a trial, in this process: writes, zeros and trims, some of them in flight together, other
// sizes, and now and then back to reading and on. Every change is made in the model too.

import assert from 'node:assert/strict'
import type { Random } from '../../../src/base/random.ts'
import { roundDown } from '../../../src/base/round.ts'
import { FUA, type Layer, MAY_UNMAP } from '../../../src/block/device.ts'
import { openChain } from '../../../src/chain/open.ts'
import { ClusterCompressor } from '../../../src/format/qcow2/cluster-compressor.ts'
import { Qcow2Image } from '../../../src/format/qcow2/image.ts'
import { realHost } from '../../../src/host/real.ts'
import { changeSnapshots } from './snapshots.ts'
import {
  assertSame,
  canResize,
  otherSize,
  paintNoise,
  paintPattern,
  type Range,
  resized,
  SECTOR,
  someRange,
  type Trial,
} from './state.ts'

const CHANGES = 16
/** Clusters compressed at the start. */
const PACKED_MOST = 12

/** Opens the image of the trial, with what is below it, for `work`. */
export async function withImage(file: string, work: (image: Qcow2Image) => Promise<void>): Promise<void> {
  const layers = await openChain({ host: realHost, path: file, format: 'qcow2' })
  try {
    const image = layers.at(-1)
    assert.ok(image instanceof Qcow2Image)
    await work(image)
  } finally {
    for (const layer of layers.toReversed()) await layer.close()
  }
}

export async function varveTurn(trial: Trial): Promise<void> {
  const { random } = trial
  await withImage(trial.image, async (image) => {
    await image.setAccess('write')
    const compressor = new ClusterCompressor(image.header.compression, image.header.clusterSize)
    for (let i = 0; i < CHANGES; i++) {
      const kind = random.below(12)
      if (kind === 0) await resize(trial, image)
      else if (kind === 1) await image.flush()
      else if (kind === 2) {
        await image.setAccess('read')
        await image.setAccess('write')
      } else if (kind === 3) await changeSnapshots(trial, image)
      else if (kind < 6 && trial.combination.compression !== 'none') await pack(trial, image, compressor)
      else await changeTogether(trial, image)
    }
    compressor.close()
    await assertReads(trial, image)
  })
}

/** Some changes of places of their own, in flight together. */
export async function changeTogether(trial: Trial, image: Layer): Promise<void> {
  const { random, model, history } = trial
  const ranges: Range[] = []
  for (let more = random.between(1, 4); more > 0; more--) {
    const range = someRange(random, model.length, trial.combination.clusterSize)
    const isApart = ranges.every((r) => r.offset >= range.offset + range.length || range.offset >= r.offset + r.length)
    if (isApart) ranges.push(range)
  }
  const steps = ranges.map((range) => ({ range, kind: random.pick(KINDS) }))
  history.push(steps.map(({ range, kind }) => `${kind} ${range.offset} ${range.length}`).join(' | '))
  const before = steps.some(({ kind }) => kind === 'trim') ? Buffer.from(model) : model
  for (const { range, kind } of steps) paint(random, model, range, kind)
  await Promise.all(steps.map(async ({ range, kind }) => perform(image, model, range, kind)))
  for (const { range, kind } of steps) if (kind === 'trim') await learnTrim(image, { before, model, range })
}

const KINDS = ['noise', 'noise', 'pattern', 'unaligned', 'zero', 'unmap', 'trim'] as const
type Kind = (typeof KINDS)[number]

function inner({ offset, length }: Range): Range {
  return { offset: offset + 3, length: length - 10 }
}

function paint(random: Random, model: Buffer, range: Range, kind: Kind): void {
  if (kind === 'noise') paintNoise(random, model, range)
  else if (kind === 'unaligned') paintNoise(random, model, inner(range))
  else if (kind === 'pattern') paintPattern(random, model, range)
  else if (kind !== 'trim') model.fill(0, range.offset, range.offset + range.length)
}

async function perform(image: Layer, model: Buffer, range: Range, kind: Kind): Promise<void> {
  const { offset, length } = kind === 'unaligned' ? inner(range) : range
  if (kind === 'zero') await image.zero(offset, length, 0)
  else if (kind === 'unmap') await image.zero(offset, length, MAY_UNMAP)
  else if (kind === 'trim') await image.trim(offset, length, 0)
  else await image.write(offset, length, model, offset, kind === 'pattern' ? FUA : 0)
}

/** Stores a cluster compressed, whatever is there. */
async function pack(trial: Trial, image: Qcow2Image, compressor: ClusterCompressor): Promise<void> {
  const { random, model, history } = trial
  const { clusterSize } = image.header
  const offset = roundDown(random.below(model.length), clusterSize)
  const length = Math.min(clusterSize, model.length - offset)
  history.push(`packs ${offset} ${length}`)
  paintPattern(random, model, { offset, length })
  if (random.chance(0.7)) paintNoise(random, model, { offset, length: random.below(length) })
  const cluster = Buffer.alloc(clusterSize)
  model.copy(cluster, 0, offset, offset + length)
  await image.writeCompressed(offset, await compressor.compress(cluster), cluster, 0, length)
}

/** Stores some clusters compressed, in an image that is open for reading. */
export async function packSome(trial: Trial, image: Qcow2Image): Promise<void> {
  await image.setAccess('write')
  const compressor = new ClusterCompressor(image.header.compression, image.header.clusterSize)
  for (let more = trial.random.between(1, PACKED_MOST); more > 0; more--) await pack(trial, image, compressor)
  compressor.close()
}

interface Trimmed {
  readonly before: Buffer
  readonly model: Buffer
  readonly range: Range
}

/** A trimmed block reads as before or as zeros: whichever it is, it stays. */
async function learnTrim(image: Layer, { before, model, range }: Trimmed): Promise<void> {
  const { offset, length } = range
  await image.read(offset, length, model, offset)
  const zeros = Buffer.alloc(SECTOR)
  for (let at = offset; at < offset + length; at += SECTOR) {
    const block = model.subarray(at, at + SECTOR)
    assert.ok(
      block.equals(zeros) || block.equals(before.subarray(at, at + SECTOR)),
      `a trimmed block at ${at} is neither`,
    )
  }
}

async function resize(trial: Trial, image: Qcow2Image): Promise<void> {
  if (!canResize(trial)) return
  const size = otherSize(trial)
  trial.history.push(`resize to ${size}`)
  await image.resize(size, { shrink: size < trial.model.length })
  trial.model = resized(trial.model, size)
}

/** Fails when the image holds anything other than the model. */
export async function assertReads(trial: Trial, image: Layer): Promise<void> {
  const bytes = Buffer.alloc(image.size)
  await image.read(0, bytes.length, bytes, 0)
  assertSame(bytes, trial.model, 'Varve reads')
}
