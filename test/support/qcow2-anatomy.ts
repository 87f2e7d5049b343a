// Where the structures of a small, sound qcow2 image lie, as byte offsets of its file: for tests that damage them. Knows the
// specification, and trusts the bytes.

const OFFSET = 0x00ff_ffff_ffff_fe00n
const COMPRESSED = 1n << 62n

export interface Anatomy {
  readonly version: number
  readonly clusterSize: number
  readonly clusterBits: number
  /** Bytes of an L2 entry: 8, or 16 when extended. */
  readonly entrySize: number
  readonly headerLength: number
  /** Header extensions: where each begins, and its type. */
  readonly extensions: readonly { readonly at: number; readonly type: number }[]
  readonly l1: number
  readonly l1Size: number
  readonly refcountTable: number
  /** Refcount blocks, L2 tables of the active L1 table, and places of the L2 entries by what they lead to. */
  readonly refcountBlocks: readonly number[]
  readonly l2Tables: readonly number[]
  readonly dataEntries: readonly number[]
  readonly compressedEntries: readonly number[]
  readonly zeroEntries: readonly number[]
  readonly emptyEntries: readonly number[]
  /** Entries of the snapshot table. */
  readonly snapshots: readonly number[]
  readonly bitmapDirectory: number | undefined
  readonly bitmapTables: readonly number[]
}

/** Finds the structures in the image's bytes. */
export function dissect(image: Buffer): Anatomy {
  const u32 = (at: number): number => image.readUInt32BE(at)
  const u64 = (at: number): bigint => image.readBigUInt64BE(at)
  const version = u32(4)
  const clusterBits = u32(20)
  const clusterSize = 2 ** clusterBits
  const headerLength = version === 2 ? 72 : u32(100)
  const isExtended = version === 3 && (u64(72) & 16n) !== 0n
  const entrySize = isExtended ? 16 : 8
  const extensions: { at: number; type: number }[] = []
  for (let at = headerLength; at + 8 <= clusterSize && u32(at) !== 0; at += 8 + Math.ceil(u32(at + 4) / 8) * 8)
    extensions.push({ at, type: u32(at) })

  const table = (offset: number, entries: number): number[] => {
    const found: number[] = []
    for (let i = 0; i < entries; i++) {
      const place = Number(u64(offset + i * 8) & OFFSET)
      if (place !== 0) found.push(place)
    }
    return found
  }
  const l1 = Number(u64(40))
  const l1Size = u32(36)
  const refcountTable = Number(u64(48))
  const l2Tables = table(l1, l1Size)
  const places = { data: [] as number[], compressed: [] as number[], zero: [] as number[], empty: [] as number[] }
  for (const l2 of l2Tables) {
    for (let at = l2; at < l2 + clusterSize; at += entrySize) {
      const entry = u64(at)
      const isZero = isExtended ? u32(at + 12) === 0 && u32(at + 8) !== 0 : (entry & 1n) !== 0n
      if ((entry & COMPRESSED) !== 0n) places.compressed.push(at)
      else if (isZero) places.zero.push(at)
      else if ((entry & OFFSET) !== 0n) places.data.push(at)
      else places.empty.push(at)
    }
  }
  const snapshots: number[] = []
  for (let i = 0, at = Number(u64(64)); i < u32(60); i++) {
    snapshots.push(at)
    at += Math.ceil((40 + u32(at + 36) + image.readUInt16BE(at + 12) + image.readUInt16BE(at + 14)) / 8) * 8
  }
  const bitmaps = extensions.find(({ type }) => type === 0x2385_2875)
  const bitmapDirectory = bitmaps === undefined ? undefined : Number(u64(bitmaps.at + 24))
  return {
    version,
    clusterSize,
    clusterBits,
    entrySize,
    headerLength,
    extensions,
    l1,
    l1Size,
    refcountTable,
    refcountBlocks: table(refcountTable, (u32(56) * clusterSize) / 8),
    l2Tables,
    dataEntries: places.data,
    compressedEntries: places.compressed,
    zeroEntries: places.zero,
    emptyEntries: places.empty,
    snapshots,
    bitmapDirectory,
    bitmapTables: bitmapDirectory === undefined ? [] : [Number(u64(bitmapDirectory))],
  }
}

/** Sets bits of the 64-bit number at `at`. */
export function setBits(image: Buffer, at: number, bits: bigint): void {
  image.writeBigUInt64BE(image.readBigUInt64BE(at) | bits, at)
}

export function clearBits(image: Buffer, at: number, bits: bigint): void {
  image.writeBigUInt64BE(image.readBigUInt64BE(at) & ~bits, at)
}

/** Adds to the 64-bit number at `at`. */
export function addTo(image: Buffer, at: number, amount: number): void {
  image.writeBigUInt64BE(BigInt.asUintN(64, image.readBigUInt64BE(at) + BigInt(amount)), at)
}
