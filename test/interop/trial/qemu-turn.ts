// QEMU's turn on the image of a trial: one qemu-io with a script of changes, and now and then another size by qemu-img
// resize. What QEMU cannot do with an image of this kind is left out here, with the reason.

import { roundDown, roundUp } from '../../../src/base/round.ts'
import { peer } from '../../support/peer.ts'
import { changeSnapshots } from './snapshots.ts'
import { canResize, otherSize, paintPattern, type Range, resized, someRange, type Trial } from './state.ts'

const COMMANDS = 24
const COMPRESSED = 3

/** Runs qemu-io with a script on a qcow2 image; one failed command fails it all. */
export function qemuIo(image: string, script: readonly string[]): void {
  if (script.length > 0) peer('qemu-io', '-f', 'qcow2', ...script.flatMap((command) => ['-c', command]), image)
}

export async function qemuTurn(trial: Trial): Promise<void> {
  await changeSnapshots(trial)
  const isResizedFirst = trial.random.chance(0.5)
  if (isResizedFirst) resize(trial)
  const script = [...Array.from({ length: COMMANDS }, () => change(trial)).flat(), ...compressed(trial)]
  trial.history.push(...script)
  qemuIo(trial.image, script)
  if (!isResizedFirst) resize(trial)
}

/** Commands for one change, which is made in the model too. */
function change(trial: Trial): string[] {
  const { random, model } = trial
  const { clusterSize } = trial.combination
  const range = someRange(random, model.length, clusterSize)
  const kind = random.below(20)
  if (kind < 10) return [writePattern(trial, range)]
  if (kind < 13) return [zero(trial, range, 'write -z')]
  if (kind < 16) return [zero(trial, range, 'write -z -u')]
  if (kind < 19) return discard(trial, range)
  return ['flush']
}

export function writePattern(trial: Pick<Trial, 'random' | 'model'>, range: Range, flags = ''): string {
  return `write ${flags}-P ${paintPattern(trial.random, trial.model, range)} ${range.offset} ${range.length}`
}

function zero(trial: Trial, { offset, length }: Range, command: string): string {
  trial.model.fill(0, offset, offset + length)
  return `${command} ${offset} ${length}`
}

/** Whole clusters only: what QEMU does with parts of them is its own affair. */
function discard(trial: Trial, { offset, length }: Range): string[] {
  // Version 2 has no zero clusters, so that what is below would show.
  if (trial.combination.version === '0.10' && trial.backingSize > 0) return []
  const whole = wholeClusters(trial, offset, offset + length)
  return whole === undefined ? [] : [zero(trial, whole, 'discard')]
}

/**
 * Some compressed clusters. They go only where none is allocated, so each place is discarded first. QEMU packs a
 * compressed cluster behind the last one of its process even when that one's host cluster was freed and belongs to others by then;
 * so nothing is freed between them.
 */
function compressed(trial: Trial): string[] {
  const { random, combination, model } = trial
  const { clusterSize } = combination
  if (combination.compression === 'none') return []
  const offsets = Array.from({ length: COMPRESSED }, () => roundDown(random.below(model.length), clusterSize))
  const ranges = [...new Set(offsets)].map((offset) => ({
    offset,
    length: Math.min(clusterSize, model.length - offset),
  }))
  const discards = ranges.flatMap((range) => discard(trial, range))
  return discards.length === 0 ? [] : [...discards, ...ranges.map((range) => writePattern(trial, range, '-c '))]
}

/** The whole clusters of a range, the disk's short last one among them. */
function wholeClusters({ combination, model }: Trial, start: number, end: number): Range | undefined {
  const { clusterSize } = combination
  const first = roundUp(start, clusterSize)
  const last = end === model.length ? end : roundDown(end, clusterSize)
  return last > first ? { offset: first, length: last - first } : undefined
}

function resize(trial: Trial): void {
  const { random, model } = trial
  if (!canResize(trial) || !random.chance(0.4)) return
  const other = otherSize(trial)
  // What is past the end in the last cluster QEMU keeps when a disk shrinks, and shows again when it grows.
  const size = other < model.length ? roundUp(other, trial.combination.clusterSize) : other
  if (size > other && size >= model.length) return
  // Version 2 cannot hide what a longer disk below would show in the new part.
  if (trial.combination.version === '0.10' && trial.backingSize > model.length) return
  if (size > model.length && mayEndInPackedSubclusters(trial)) return
  trial.history.push(`qemu-img resize to ${size}`)
  const flags = size < model.length ? ['--shrink'] : []
  peer('qemu-img', 'resize', '-q', '-f', 'qcow2', ...flags, trial.image, String(size))
  trial.model = resized(model, size)
}

/** QEMU cannot zero some subclusters of a compressed cluster, as it would when a disk that ends within one grows. */
function mayEndInPackedSubclusters({ combination, model }: Trial): boolean {
  const { extendedL2, compression, clusterSize } = combination
  return extendedL2 && compression !== 'none' && model.length % clusterSize > 0
}
