// What a trial of one combination holds: the image's files, the model of its content, the random numbers, and what was
// done so far. Random content comes from here too: noise, runs of one byte and zeros, so that it compresses or not.

import assert from 'node:assert/strict'
import { Random } from '../../../src/base/random.ts'
import type { Combination } from '../matrix.ts'

export const SECTOR = 512

export interface Trial {
  readonly combination: Combination
  readonly random: Random
  /** Where all files are; nothing else is in it. */
  readonly folder: string
  /** The image, in that folder. */
  readonly image: string
  /** Raw data of the image, in that folder, when the combination has a data file. */
  readonly dataFile: string
  /** What the image's disk holds. */
  model: Buffer
  /** Bytes of the disk below; 0 without one. */
  backingSize: number
  /** What each internal snapshot holds, by name. */
  readonly snapshots: Map<string, Buffer>
  readonly history: string[]
}

export interface Range {
  readonly offset: number
  readonly length: number
}

/** A random range of whole sectors, at least one: of a few sectors, about a cluster, or a few clusters. */
export function someRange(random: Random, size: number, clusterSize: number): Range {
  const length = SECTOR * random.between(1, random.pick([16, (2 * clusterSize) / SECTOR, (5 * clusterSize) / SECTOR]))
  const isAligned = random.chance(0.4)
  const unit = isAligned ? clusterSize : SECTOR
  const offset = Math.floor(random.below(size) / unit) * unit
  const wanted = isAligned && length > clusterSize ? Math.floor(length / clusterSize) * clusterSize : length
  return { offset, length: Math.min(size - offset, wanted) }
}

const NOISE_BYTES = 64 * 1024
const noise = new Random(1).fill(new Uint8Array(NOISE_BYTES))

/** Fills a range of `bytes` with noise. */
export function paintNoise(random: Random, bytes: Uint8Array, { offset, length }: Range): void {
  // Each piece begins elsewhere in the noise: what is written in the wrong place is seen.
  for (let done = 0; done < length; ) {
    const from = random.below(NOISE_BYTES)
    const piece = Math.min(length - done, NOISE_BYTES - from)
    bytes.set(noise.subarray(from, from + piece), offset + done)
    done += piece
  }
}

/** Fills a range of `bytes` with one byte, and returns it. */
export function paintPattern(random: Random, bytes: Uint8Array, { offset, length }: Range): number {
  const byte = random.chance(0.1) ? 0 : random.between(1, 255)
  bytes.fill(byte, offset, offset + length)
  return byte
}

/** Fills some places of `bytes`, about half. */
export function paintSome(random: Random, bytes: Uint8Array, clusterSize: number): void {
  for (let offset = 0; offset < bytes.length; ) {
    const length = Math.min(bytes.length - offset, SECTOR * random.between(1, (3 * clusterSize) / SECTOR))
    if (random.chance(0.3)) paintNoise(random, bytes, { offset, length })
    else if (random.chance(0.4)) paintPattern(random, bytes, { offset, length })
    offset += length
  }
}

/** The content after a change of size: what is added reads as zeros. */
export function resized(model: Buffer, size: number): Buffer {
  const changed = Buffer.alloc(size)
  model.copy(changed)
  return changed
}

/** Another size for the disk, larger or smaller, in whole sectors. */
export function otherSize({ random, model, combination }: Trial): number {
  const step = SECTOR * random.between(1, random.pick([8, (3 * combination.clusterSize) / SECTOR]))
  return random.chance(0.6) ? model.length + step : Math.max(SECTOR, model.length - step)
}

/** True when both programs can change the size: QEMU does not for an image of version 2 that has snapshots. */
export function canResize({ combination, snapshots }: Trial): boolean {
  return combination.version !== '0.10' || snapshots.size === 0
}

/** Fails, with the first difference, when the bytes are not the same. */
export function assertSame(found: Buffer, expected: Buffer, what: string): void {
  assert.equal(found.length, expected.length, `${what}: the size`)
  if (found.equals(expected)) return
  let at = 0
  while (found[at] === expected[at]) at++
  let end = at
  while (end < expected.length && found[end] !== expected[end]) end++
  const show = (bytes: Buffer): string => bytes.subarray(at, at + 8).toString('hex')
  assert.fail(`${what}: from ${at}, ${end - at} bytes or more, ${show(found)} in place of ${show(expected)}`)
}
