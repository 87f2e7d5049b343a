// What a guest's disk may hold after a crash, sector by sector. Every request writes sectors that name it, so that what is found
// tells which request it came from, and whether it is whole and in its place. Of each sector the acts that may still be seen are
// kept: those that no settled one came after. Settled is what was acknowledged, when the process dies, and what a flush
// covered, when the power fails. Times are places in the log of a run.
//
//   a sector   | id | sector | id | sector | ...   32 bits each, native order; all zeros: id 0

import { SECTOR } from './crash-disk.ts'

export type Death = 'process' | 'host'

/** Something that a sector, the size or the backing reference may have become. */
export interface Act {
  /** What it becomes: the id of a request, 0 for zeros; or a size, or the number of a backing reference. */
  readonly id: number
  readonly issued: number
  /** When it was acknowledged, or died with its process. */
  done: number
  /** False when it may have had no effect: a trim, or a request that died with its process. */
  isSure: boolean
}

export const ZEROS = 0
/** What the backing file holds. */
export const BELOW = 1
/** A sector that no request wrote: torn, or in a wrong place. */
export const NOBODYS = -1

const WORDS = SECTOR / 4

/** Fills sectors from number `first` on with what request `id` writes there. */
export function fillSectors(bytes: Uint8Array, first: number, id: number): Uint8Array {
  if (id === ZEROS) return bytes.fill(0)
  const words = new Uint32Array(bytes.buffer, bytes.byteOffset, bytes.length / 4)
  for (let i = 0; i < words.length; i += 2) {
    words[i] = id
    words[i + 1] = first + Math.floor(i / WORDS)
  }
  return bytes
}

/** Which request wrote sector `index` of `words`, whose first sector is number `first` of the disk. */
export function idOf(words: Uint32Array, index: number, first: number): number {
  const start = index * WORDS
  const end = start + WORDS
  const id = words[start] as number
  const place = id === ZEROS ? 0 : first + index
  for (let at = start; at < end; at += 2) if (words[at] !== id || words[at + 1] !== place) return NOBODYS
  return id
}

/** What one sector, or the size, may be. */
export class Versions {
  #acts: Act[]

  constructor(id: number) {
    this.#acts = [{ id, issued: -1, done: -1, isSure: true }]
  }

  add(act: Act): void {
    this.#acts.push(act)
  }

  /** What was acknowledged before `upTo` survives the host from now on. */
  settle(upTo: number): void {
    if (this.#acts.length > 1) this.#acts = this.#acts.filter((act) => !this.#isReplaced(act, upTo))
  }

  allows(id: number, died: Death, now: number): boolean {
    const acts = this.#acts
    // Nothing came after the last one.
    if ((acts.at(-1) as Act).id === id) return true
    return acts.some((act) => act.id === id && (died === 'host' || !this.#isReplaced(act, now)))
  }

  /** For messages: the ids that are allowed. */
  describe(died: Death, now: number): string {
    return this.#acts
      .filter((act) => died === 'host' || !this.#isReplaced(act, now))
      .map((act) => `${act.id}${act.done < now ? '' : ' (in flight)'}`)
      .join(', ')
  }

  #isReplaced(act: Act, upTo: number): boolean {
    return this.#acts.some((later) => later.isSure && later.done < upTo && later.issued > act.done)
  }
}

export class DiskModel {
  readonly size: Versions
  readonly reference = new Versions(0)
  /** What is kept beside the disk. */
  readonly world = new Versions(0)
  readonly #sectors: Versions[] = []

  /** `backed`: how many sectors from the start show what the backing file holds. */
  constructor(size: number, backed: number) {
    this.size = new Versions(size)
    for (let i = 0; i < size / SECTOR; i++) this.#sectors.push(new Versions(i < backed ? BELOW : ZEROS))
  }

  add(act: Act, first: number, count: number): void {
    for (let i = first; i < first + count; i++) (this.#sectors[i] ??= new Versions(ZEROS)).add(act)
  }

  settle(upTo: number): void {
    for (const versions of this.#sectors) versions.settle(upTo)
  }

  /** What is wrong with the disk found, as a sentence; undefined when nothing is. */
  firstWrong(bytes: Uint8Array, died: Death, now: number): string | undefined {
    if (!this.size.allows(bytes.length, died, now))
      return `the disk has ${bytes.length} bytes, not ${this.size.describe(died, now)}`
    const words = new Uint32Array(bytes.buffer, bytes.byteOffset, bytes.length / 4)
    for (let i = 0; i < words.length / WORDS; i++) {
      const id = idOf(words, i, 0)
      const versions = this.#sectors[i] as Versions
      if (!versions.allows(id, died, now))
        return `sector ${i} holds ${id === NOBODYS ? 'what nobody wrote' : id}, not ${versions.describe(died, now)}`
    }
    return undefined
  }
}
