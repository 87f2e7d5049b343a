// The references of one L2 table of a qcow2 image, standard or extended: the clusters that its entries lead to, and the entries
// that cannot be right. Which tables there are is references.ts's work.

import { getUint32 } from '../../base/bytes.ts'
import { andThen, type Pending } from '../../block/device.ts'
import type { Header } from './header.ts'
import type { EntryFlaw, Visitor } from './references.ts'
import * as spec from './spec.ts'

/** How many L1 entries lead to a table: those of the active L1 table, and of all. */
export interface Weight {
  readonly active: number
  readonly all: number
}

interface FlawedEntry {
  readonly host: number
  readonly isCopied: boolean
  readonly isZero: boolean
  readonly isReserved: boolean
  readonly isPlaced: boolean
  readonly zeros: number
  readonly data: number
}

export class L2Walk {
  readonly #header: Header
  readonly #visitor: Visitor
  readonly #l1: Uint8Array
  readonly #fileSize: number
  readonly #hasDataFile: boolean
  readonly #reservedLow: number
  /** The bits of an entry's offset that lead into a cluster, in its low half. */
  readonly #withinCluster: number
  /** Where the active table's first cluster lies in a data file, once an entry has said it. */
  #base = -1
  #place = 0
  #weight: Weight = { active: 0, all: 0 }
  #allocated = 0
  #fragmented = 0
  #compressed = 0
  #expected = 0

  /** `l1` is the active L1 table, which says what of a data file a table maps. */
  constructor(header: Header, visitor: Visitor, l1: Uint8Array, fileSize: number) {
    this.#header = header
    this.#visitor = visitor
    this.#l1 = l1
    this.#fileSize = fileSize
    this.#withinCluster = (header.clusterSize - 1) & spec.OFFSET_LOW
    this.#hasDataFile = (header.incompatible & spec.INCOMPAT_DATA_FILE) !== 0
    this.#reservedLow = header.extendedL2 ? spec.EXTENDED_L2_RESERVED_LOW : spec.L2_RESERVED_LOW
  }

  /** Visits the entries of the table in `bytes`, which is at `place`. */
  async walk(bytes: Uint8Array, place: number, weight: Weight): Promise<void> {
    const { extendedL2, l2EntrySize } = this.#header
    this.#place = place
    this.#weight = weight
    this.#base = -1
    this.#allocated = 0
    this.#fragmented = 0
    this.#compressed = 0
    this.#expected = 0
    const words = new Uint32Array(bytes.buffer, bytes.byteOffset, bytes.length / 4)
    const step = l2EntrySize / 4
    for (let at = 0, word = 0; at < bytes.length; at += l2EntrySize, word += step) {
      // Most entries of most tables are empty: passed over before anything is decoded.
      if (words[word] === 0 && words[word + 1] === 0 && words[word + step - 1] === 0) continue
      const high = getUint32(bytes, at)
      const low = getUint32(bytes, at + 4)
      const zeros = extendedL2 ? getUint32(bytes, at + spec.SUBCLUSTERS_ZERO) : 0
      const data = extendedL2 ? getUint32(bytes, at + spec.SUBCLUSTERS_ALLOCATED) : 0
      const isCompressed = (high & spec.OFLAG_COMPRESSED_HIGH) !== 0
      const wait = isCompressed
        ? this.#visitCompressed(at, high, low, zeros !== 0 || data !== 0)
        : this.#visitStandard(at, high, low, zeros, data)
      if (wait !== undefined) await wait
    }
    if (weight.active > 0) this.#visitor.guest?.(this.#allocated, this.#fragmented, this.#compressed, weight.active)
  }

  /** Undefined when the entry is right and its visitor does not have to be waited for, as nearly always. */
  #visitStandard(at: number, high: number, low: number, zeros: number, data: number): Pending {
    const { extendedL2, version } = this.#header
    const host = spec.entryOffset(high, low)
    const isCopied = high >= spec.OFLAG_COPIED_HIGH
    const isZero = extendedL2 ? data === 0 : (low & spec.OFLAG_ZERO_LOW) !== 0
    const isReserved = (high & spec.L2_RESERVED_HIGH) !== 0 || (low & this.#reservedLow) !== 0
    const isPlaced = host !== 0 || (this.#hasDataFile && isCopied)
    const isFlawed =
      isReserved ||
      (zeros & data) !== 0 ||
      (isPlaced ? (low & this.#withinCluster) !== 0 : data !== 0 || isCopied) ||
      (version === 2 && isZero)
    if (isFlawed) return this.#visitFlawed(at, { host, isCopied, isZero, isReserved, isPlaced, zeros, data })
    if (!isPlaced) return undefined
    // Of a zero flag at place 0 of a data file, QEMU does not say whether a place is kept, and does not count it.
    const isCounted = host !== 0 || !isZero || extendedL2
    return this.#visitPlaced(at, host, isCopied, isCounted)
  }

  #visitPlaced(at: number, host: number, isCopied: boolean, isCounted: boolean): Pending {
    const { clusterSize } = this.#header
    const place = this.#place + at
    if (isCounted) this.#countGuest(host)
    if (this.#hasDataFile) return this.#visitInDataFile(at, host, isCopied)
    if (host >= this.#fileSize) return this.#visitPastEnd(place, host, isCopied)
    this.#visitor.area(host, clusterSize, 'data', this.#weight.all)
    return this.#weight.active === 0 ? undefined : this.#visitor.flag?.(place, host, isCopied, this.#weight.active)
  }

  async #visitPastEnd(place: number, host: number, isCopied: boolean): Promise<void> {
    await this.#visitor.flaw('past end', place, this.#weight.all, this.#weight.active > 0)
    if (this.#weight.active > 0) await this.#visitor.flag?.(place, host, isCopied, this.#weight.active)
  }

  #countGuest(host: number): void {
    this.#allocated++
    if (this.#expected !== 0 && host !== this.#expected) this.#fragmented++
    this.#expected = host + this.#header.clusterSize
  }

  /** Clusters of a data file lie at the guest's own offset, and are not counted. */
  #visitInDataFile(at: number, host: number, isCopied: boolean): Pending {
    const { clusterSize, l2EntrySize } = this.#header
    const base = host - (at / l2EntrySize) * clusterSize
    if (this.#base < 0 && this.#isBase(base)) this.#base = base
    const wait = base === this.#base ? undefined : this.#flaw('other place in data file', at)
    return andThen(wait, () => this.#visitor.flag?.(this.#place + at, -1, isCopied, this.#weight.active))
  }

  /** True when the L1 entry of the guest offset leads to this table. */
  #isBase(base: number): boolean {
    const { clusterSize, l2EntrySize } = this.#header
    const at = (base / ((clusterSize / l2EntrySize) * clusterSize)) * spec.ENTRY_SIZE
    if (at < 0 || at % spec.ENTRY_SIZE !== 0 || at >= this.#l1.length) return false
    return spec.entryOffset(getUint32(this.#l1, at), getUint32(this.#l1, at + 4)) === this.#place
  }

  async #visitFlawed(at: number, entry: FlawedEntry): Promise<void> {
    const { clusterSize, version } = this.#header
    const { host, isCopied, isZero, isReserved, isPlaced, zeros, data } = entry
    if (isReserved) await this.#flaw('reserved', at)
    if ((zeros & data) !== 0) await this.#flaw('subclusters both', at)
    if (version === 2 && isZero) await this.#flaw('zeros in version 2', at)
    if (!isPlaced) {
      if (data !== 0) await this.#flaw('subclusters nowhere', at)
      else if (isCopied) await this.#flaw('nowhere', at)
      return
    }
    // What an unaligned entry touches counts as used, so that nothing else is put there.
    if (host % clusterSize !== 0 && isZero) await this.#flaw('unaligned zeros', at)
    else if (host % clusterSize !== 0) await this.#flaw(host < this.#fileSize ? 'unaligned' : 'unaligned past end', at)
    await this.#visitPlaced(at, host, isCopied, true)
  }

  #visitCompressed(at: number, high: number, low: number, hasSubclusters: boolean): Pending {
    const flaws: EntryFlaw[] = []
    if (high >= spec.OFLAG_COPIED_HIGH) flaws.push('compressed copied')
    if (this.#hasDataFile) flaws.push('compressed in data file')
    else if (hasSubclusters) flaws.push('compressed subclusters')
    else {
      const { clusterBits, clusterSize } = this.#header
      const host = spec.compressedOffset(high, low, clusterBits)
      const length = spec.compressedLength(high, low, clusterBits)
      this.#allocated++
      this.#compressed++
      // Compressed clusters share sectors with their neighbours, so that reading them in order reads some twice.
      this.#fragmented++
      if (host + length - this.#fileSize >= clusterSize) flaws.push('compressed past end')
      else this.#visitor.area(host, length, 'compressed', this.#weight.all)
    }
    return flaws.length === 0 ? undefined : this.#flaws(flaws, at)
  }

  async #flaws(flaws: readonly EntryFlaw[], at: number): Promise<void> {
    for (const flaw of flaws) await this.#flaw(flaw, at)
  }

  async #flaw(flaw: EntryFlaw, at: number): Promise<void> {
    await this.#visitor.flaw(flaw, this.#place + at, this.#weight.all, this.#weight.active > 0)
  }
}
