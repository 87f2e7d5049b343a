// A disk as plain numbers, beside the engine's: each sector holds the stamp of the last write to it, 0 for zeros, and every snapshot
// is a copy of that. Guests write several ranges at once, which do not overlap; what a snapshot shows of a write that was under way may
// be old or new, and from then on stays as it is.

import assert from 'node:assert/strict'
import { getUint32, setUint32 } from '../../src/base/bytes.ts'
import type { Random } from '../../src/base/random.ts'
import type { BlockDevice } from '../../src/block/device.ts'
import type { Lab } from '../support/lab.ts'

export const SECTOR = 512
/** Sectors that a request has at most. */
const REQUEST_MAX = 160

/** A guest's request under way. */
interface Request {
  readonly first: number
  readonly count: number
  /** What its sectors may hold from its beginning on, besides what they held. */
  readonly stamp: number
  readonly done: Promise<void>
}

export class ModelDisk {
  readonly name: string
  readonly snapshots = new Map<string, Uint32Array>()
  /** What the sectors hold, of requests that are done. */
  now: Uint32Array
  /** While it is set no request begins: a revert. */
  isHeld = false
  readonly #lab: Lab
  readonly #random: Random
  readonly #underWay = new Set<Request>()
  /** Of each command that takes a moment: the stamps that came or went while it ran, by sector. */
  readonly #watching = new Set<Map<number, Set<number>>>()
  #stamp = 0

  constructor(lab: Lab, random: Random, name: string, sectors: Uint32Array) {
    this.#lab = lab
    this.#random = random
    this.name = name
    this.now = sectors
    // Of different disks, different stamps.
    for (const letter of name) this.#stamp = (this.#stamp * 31 + letter.charCodeAt(0)) % 4096
    this.#stamp *= 1_000_000
  }

  get device(): BlockDevice {
    return this.#lab.guest(this.name)
  }

  get requests(): number {
    return this.#underWay.size
  }

  /** Begins a request on sectors that no other one is at, if it finds any; a failure is thrown by `idle`. */
  begin(): void {
    const count = this.#random.between(1, this.#random.chance(0.2) ? REQUEST_MAX : 16)
    const first = this.#random.below(Math.max(1, this.now.length - count))
    if (this.isHeld) return
    if (this.#random.chance(0.03)) {
      this.#track(0, 0, 0, Promise.resolve(this.device.flush()))
      return
    }
    const isTaken = (other: Request): boolean => first < other.first + other.count && other.first < first + count
    if ([...this.#underWay].some(isTaken)) return
    const kind = this.#random.pick(['write', 'write', 'write', 'write', 'zero', 'trim', 'read'] as const)
    const stamp = kind === 'write' ? ++this.#stamp : 0
    if (kind !== 'read') this.#note(first, count, stamp)
    this.#track(first, count, stamp, this.#perform(kind, first, count, stamp))
  }

  #track(first: number, count: number, stamp: number, work: Promise<void>): void {
    const done = work.finally(() => this.#underWay.delete(request))
    // Whoever waits for it hears of a failure; until then it is nobody's.
    done.catch(() => undefined)
    const request: Request = { first, count, stamp, done }
    this.#underWay.add(request)
  }

  /** Waits until some request is done, or `all` of them. */
  async idle(all = true): Promise<void> {
    const pending = [...this.#underWay].map(({ done }) => done)
    if (pending.length > 0) await (all ? Promise.all(pending) : Promise.race(pending))
  }

  /**
   * Runs work that takes the disk's moment at some time while it runs; returns what each sector may show then: `content` and, by sector,
   * what else.
   */
  async moment(work: () => Promise<unknown>): Promise<(shown: Uint32Array, note: string) => void> {
    const others = new Map<number, Set<number>>()
    this.#watching.add(others)
    const before = this.now.slice()
    for (const { first, count, stamp } of this.#underWay) addTo(others, first, count, stamp)
    try {
      await work()
    } finally {
      this.#watching.delete(others)
    }
    return (shown, note) => {
      shown.forEach((stamp, sector) => {
        const may = stamp === before[sector] || others.get(sector)?.has(stamp) === true
        assert.ok(may, `${note}: sector ${sector} shows ${stamp}, not ${before[sector]} or another of that moment`)
      })
    }
  }

  /** The whole disk is as it must be; no request may be under way. */
  async check(note: string): Promise<void> {
    assertEqual(await readStamps(this.device), this.now, `${note}: disk ${this.name}`)
  }

  async #perform(kind: 'write' | 'zero' | 'trim' | 'read', first: number, count: number, stamp: number): Promise<void> {
    const [offset, length] = [first * SECTOR, count * SECTOR]
    const bytes = Buffer.alloc(length)
    if (kind === 'write') {
      for (let at = 0; at < length; at += 4) setUint32(bytes, at, stamp)
      await this.device.write(offset, length, bytes, 0, 0)
    } else if (kind === 'zero') await this.device.zero(offset, length, this.#random.pick([0, 2]))
    else {
      if (kind === 'trim') await this.device.trim(offset, length, 0)
      await this.device.read(offset, length, bytes, 0)
      const shown = stampsOf(bytes, `a read of ${this.name} at sector ${first}`)
      // What is trimmed may read as before or as zeros.
      const old = this.now.subarray(first, first + count)
      const wanted = old.map((before, index) => (kind === 'trim' && shown[index] === 0 ? 0 : before))
      assertEqual(shown, wanted, `a ${kind} of ${this.name} from sector ${first}`)
      this.now.set(shown, first)
      return
    }
    this.now.fill(stamp, first, first + count)
  }

  #note(first: number, count: number, stamp: number): void {
    for (const others of this.#watching) addTo(others, first, count, stamp)
  }
}

function addTo(others: Map<number, Set<number>>, first: number, count: number, stamp: number): void {
  for (let sector = first; sector < first + count; sector++) {
    const stamps = others.get(sector) ?? new Set()
    others.set(sector, stamps.add(stamp))
  }
}

/** The stamp of each sector; fails when one is torn. */
export function stampsOf(bytes: Buffer, note: string): Uint32Array {
  return Uint32Array.from({ length: bytes.length / SECTOR }, (_, sector) => {
    const at = sector * SECTOR
    const stamp = getUint32(bytes, at)
    const isWhole = bytes.subarray(at, at + SECTOR - 4).equals(bytes.subarray(at + 4, at + SECTOR))
    assert.ok(isWhole, `${note}: sector ${sector} is torn`)
    return stamp
  })
}

export async function readStamps(device: BlockDevice): Promise<Uint32Array> {
  const bytes = Buffer.alloc(device.size)
  await device.read(0, bytes.length, bytes, 0)
  return stampsOf(bytes, device.name)
}

export function assertEqual(shown: Uint32Array, wanted: Uint32Array, note: string): void {
  const sector = shown.findIndex((stamp, index) => stamp !== wanted[index])
  assert.equal(sector, -1, `${note}: sector ${sector} shows ${shown[sector]}, not ${wanted[sector]}`)
  assert.equal(shown.length, wanted.length, `${note}: size in sectors`)
}
