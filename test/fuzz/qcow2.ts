// One trial of the qcow2 fuzz: an image is damaged and then put through everything that can be done with one. It must read
// consistently or fail with a clear operating error; an image that a check finds sound must stay so, and hold what was written.

import assert from 'node:assert/strict'
import { Random } from '../../src/base/random.ts'
import { roundUp } from '../../src/base/round.ts'
import { BlockError, type ErrorKind } from '../../src/block/error.ts'
import { openQcow2, type Qcow2Image } from '../../src/format/qcow2/image.ts'
import { repairQcow2 } from '../../src/format/qcow2/repair.ts'
import type { Base } from './qcow2-bases.ts'
import { mutate } from './qcow2-mutations.ts'
import { WatchedHost } from './watched-host.ts'

const KIB = 1024
const PATH = '/image'

/** What of the disk is read and written. */
const WINDOW = 512 * KIB

/** Seconds that a trial may take, many times what any does: more is a hang. */
const SECONDS_MAX = 20

/** Operations on files that a trial may take: a repair of tables full of noise, in a few rounds, takes a tenth of them. */
const OPERATIONS_MAX = 2_000_000

/** What opening, reading and writing a damaged image may end with. */
const ALLOWED: ReadonlySet<ErrorKind> = new Set<ErrorKind>([
  'invalid-format',
  'unsupported',
  'corrupt',
  'no-space',
  'not-found',
  'invalid-argument',
])

export interface TrialResult {
  /** 'sound', 'damaged' when a check or a request found something, or the kind of the error that refused the image. */
  readonly outcome: string
  /** What a repair made of it: 'sound', 'left' when something is left, or the kind of its error. */
  readonly repaired: string
  readonly base: string
  readonly damage: string
}

/** Runs the trial of a seed; throws when a rule is broken. */
export async function runTrial(bases: readonly Base[], seed: number): Promise<TrialResult> {
  const random = new Random(seed)
  const base = random.pick(bases)
  const { bytes, damage } = mutate(base.bytes, base.anatomy, random)
  const started = performance.now()
  const outcome = await use(bytes, base, random)
  const repaired = await repair(bytes, base, random)
  const seconds = (performance.now() - started) / 1000
  assert.ok(seconds < SECONDS_MAX, `the trial took ${seconds} s`)
  return { outcome, repaired, base: base.name, damage }
}

function hostWith(bytes: Buffer, { dataFile }: Base): WatchedHost {
  const host = new WatchedHost({
    operations: OPERATIONS_MAX,
    fileBytes: roundUp(bytes.length, KIB) + 24 * KIB * KIB,
    slack: 2048 * KIB,
  })
  host.put(PATH, Buffer.from(bytes))
  if (dataFile !== undefined) host.put(`/${dataFile.name}`, Buffer.from(dataFile.bytes))
  return host
}

/** The error that `work` ends with, which must be of an allowed kind; undefined for none. */
async function errorOf(host: WatchedHost, work: () => Promise<void>): Promise<BlockError | undefined> {
  let found: BlockError | undefined
  try {
    await work()
  } catch (error) {
    if (!(error instanceof BlockError)) throw error
    assert.ok(ALLOWED.has(error.kind), `${error.kind}: ${error.message}`)
    assert.ok(error.message.length > 10, 'the message says what')
    found = error
  }
  if (host.violation !== undefined) throw host.violation
  return found
}

async function use(bytes: Buffer, base: Base, random: Random): Promise<string> {
  const host = hostWith(bytes, base)
  let image: Qcow2Image | undefined
  let isSound = false
  const refused = await errorOf(host, async () => {
    image = await openQcow2(host, PATH, { name: 'damaged' })
  })
  if (image === undefined) return refused?.kind ?? 'nothing'
  const opened = image
  // After a crash entries may lead past the end: until that is repaired, they read as zeros.
  host.watchesReads = (opened.header.incompatible & 1) === 0
  const model = Buffer.alloc(Math.min(opened.size, WINDOW))
  const read = await errorOf(host, () => readEverything(opened, model, random))
  const checked = await errorOf(host, async () => {
    const { corruptions, checkErrors } = await opened.check()
    isSound = corruptions === 0 && checkErrors === 0 && read === undefined
  })
  assert.equal(checked, undefined, 'a check always ends')
  await lookAtParts(host, opened, random)
  const changed = await change(host, opened, model, random)
  await errorOf(host, () => opened.close())
  if (isSound && changed === undefined) await assertHolds(host, model)
  return isSound ? 'sound' : 'damaged'
}

async function readEverything(image: Qcow2Image, model: Buffer, random: Random): Promise<void> {
  await image.read(0, model.length, model, 0)
  const piece = Buffer.alloc(64 * KIB)
  for (let i = 0; i < 4 && image.size > piece.length; i++)
    await image.read(random.below(image.size - piece.length), piece.length, piece, 0)
  let pieces = 0
  let end = 0
  await image.extents(0, image.size, (length) => {
    assert.ok(length > 0)
    end += length
    return ++pieces < 5000
  })
  assert.ok(pieces >= 5000 || end === image.size, 'extents cover the disk')
  pieces = 0
  await image.allocation(0, image.size, () => ++pieces < 5000)
}

/** Snapshots and bitmaps: listed and read. */
async function lookAtParts(host: WatchedHost, image: Qcow2Image, random: Random): Promise<void> {
  for (let i = 0; i < 3; i++) {
    await errorOf(host, async () => {
      const found = image.snapshots[i]
      if (found === undefined) return
      const snapshot = await image.openSnapshot(found.id)
      try {
        const piece = Buffer.alloc(Math.min(snapshot.size, 64 * KIB))
        await snapshot.read(0, piece.length, piece, 0)
        await snapshot.read(random.below(snapshot.size - piece.length + 1), piece.length, piece, 0)
      } finally {
        await snapshot.close()
      }
    })
    await errorOf(host, async () => {
      const found = image.bitmaps[i]
      if (found !== undefined) await image.readBitmap(found.name)
    })
  }
}

/** Writes, zeroes and trims; `model` follows. The first error, or undefined. */
async function change(
  host: WatchedHost,
  image: Qcow2Image,
  model: Buffer,
  random: Random,
): Promise<BlockError | undefined> {
  let first = await errorOf(host, () => image.setAccess('write'))
  if (first !== undefined) return first
  host.watchesReads = true
  const attempt = async (work: () => Promise<void>): Promise<void> => {
    const error = await errorOf(host, work)
    first ??= error
  }
  for (let i = 0; i < 12 && model.length > 0; i++) {
    const offset = random.below(model.length)
    const length = Math.min(model.length - offset, random.pick([1, 512, 4096, 70 * KIB]))
    await attempt(async () => {
      const kind = random.below(10)
      if (kind < 5) {
        const bytes = Buffer.alloc(length, random.fill(Buffer.alloc(Math.min(length, 1000))))
        await image.write(offset, length, bytes, 0, 0)
        model.set(bytes, offset)
      } else if (kind < 7) {
        await image.zero(offset, length, random.below(2) * 2)
        model.fill(0, offset, offset + length)
      } else if (kind < 8) {
        await image.trim(offset, length, 0)
        await image.read(offset, length, model, offset)
      } else await image.flush()
    })
  }
  if (random.chance(0.2)) await attempt(() => image.grow(image.size + random.below(100) * 512))
  if (random.chance(0.2)) await attempt(async () => void (await image.createSnapshot('fuzz')))
  if (random.chance(0.2))
    await attempt(async () => {
      const [snapshot] = image.snapshots
      if (snapshot !== undefined) await image.deleteSnapshot(snapshot.id)
    })
  return first
}

async function assertHolds(host: WatchedHost, model: Buffer): Promise<void> {
  const image = await openQcow2(host, PATH, { name: 'again' })
  const bytes = Buffer.alloc(model.length)
  await image.read(0, bytes.length, bytes, 0)
  assert.ok(bytes.equals(model), 'a sound image holds what was written')
  // Where two entries of a damaged image share a cluster, rightly counted, a write to one leaves the other without its copied
  // flag: that costs a copy, no more.
  const worse = (await image.check()).problems.filter((what) => !/copied flag|counted .* and used/.test(what))
  assert.deepEqual(worse, [], 'a sound image stays so')
  await image.close()
}

async function repair(bytes: Buffer, base: Base, random: Random): Promise<string> {
  const host = hostWith(bytes, base)
  host.watchesReads = false
  let isSound = false
  const failed = await errorOf(host, async () => {
    if (random.chance(0.2)) await repairQcow2(host, PATH, 'leaks')
    const first = await repairQcow2(host, PATH, 'all')
    const second = await repairQcow2(host, PATH, 'all')
    const wrong = ({ corruptions, leaks, checkErrors }: typeof first): number => corruptions + leaks + checkErrors
    assert.ok(wrong(second) <= wrong(first), `a second repair leaves no more: ${wrong(first)}, then ${wrong(second)}`)
    isSound = wrong(second) === 0
  })
  if (failed !== undefined) return failed.kind
  if (!isSound) return 'left'
  const opened = await errorOf(host, () => useRepaired(host, random))
  return opened?.kind ?? 'sound'
}

/** What a repair found sound can be written, and holds it. */
async function useRepaired(host: WatchedHost, random: Random): Promise<void> {
  const image = await openQcow2(host, PATH, { name: 'repaired' })
  host.watchesReads = true
  const model = Buffer.alloc(Math.min(image.size, WINDOW))
  const read = await errorOf(host, async () => image.read(0, model.length, model, 0))
  const changed = read ?? (await change(host, image, model, random))
  // Compressed data may be no data, and the bits of a bitmap wrong: a repair does not look at either.
  const isCorrupt = changed !== read && changed?.kind === 'corrupt' && !changed.message.includes('bitmap')
  assert.ok(!isCorrupt, `a repaired image is not corrupt: ${changed?.message}`)
  await image.close()
  if (changed === undefined) await assertHolds(host, model)
  else throw changed
}
