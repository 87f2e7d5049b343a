// The qcow2 format's constants, under the names of its specification (QEMU, docs/interop/qcow2). All numbers in an image
// are big-endian. An entry of an L1 or L2 table has 64 bits; here it is two 32-bit halves, since JavaScript's numbers
// hold only 53 bits exactly.
//
//   standard L2 entry    63 62 61      56 55                          9 8       1  0
//                        C  0  reserved   host offset of the cluster    reserved Z     C copied, Z reads as zeros
//   compressed L2 entry  63 62 61           x x-1                               0
//                        0  1  more sectors   host offset, any alignment              x = 62 - (cluster_bits - 8)
//
// With extended L2 entries each has 128 bits: one of the above, Z always 0, and then what its 32 subclusters are.
//
//   subcluster bitmap    63                            32 31                             0
//                        one bit each: reads as zeros     one bit each: is allocated        subcluster 0 at bits 32 and 0

/** "QFI\xfb" */
export const MAGIC = 0x5146_49fb

/** Byte offsets of the header's fields. */
export const HEADER = {
  magic: 0,
  version: 4,
  backing_file_offset: 8,
  backing_file_size: 16,
  cluster_bits: 20,
  size: 24,
  crypt_method: 32,
  l1_size: 36,
  l1_table_offset: 40,
  refcount_table_offset: 48,
  refcount_table_clusters: 56,
  nb_snapshots: 60,
  snapshots_offset: 64,
  incompatible_features: 72,
  compatible_features: 80,
  autoclear_features: 88,
  refcount_order: 96,
  header_length: 100,
  compression_type: 104,
} as const

export const HEADER_LENGTH_V2 = 72
export const HEADER_LENGTH_V3 = 104
/** What we write: version 3 with the compression type and its padding. */
export const HEADER_LENGTH = 112

export const MIN_CLUSTER_BITS = 9
export const MAX_CLUSTER_BITS = 21
export const MAX_BACKING_NAME = 1023
export const MAX_REFCOUNT_ORDER = 6
export const DEFAULT_REFCOUNT_ORDER = 4

/** Bits of incompatible_features. */
export const INCOMPAT_DIRTY = 1
export const INCOMPAT_CORRUPT = 2
export const INCOMPAT_DATA_FILE = 4
export const INCOMPAT_COMPRESSION = 8
export const INCOMPAT_EXTL2 = 16

export const COMPAT_LAZY_REFCOUNTS = 1
export const AUTOCLEAR_BITMAPS = 1
export const AUTOCLEAR_DATA_FILE_RAW = 2

export const COMPRESSION_TYPE_ZLIB = 0
export const COMPRESSION_TYPE_ZSTD = 1

/** Types of header extensions. */
export const EXT_END = 0
export const EXT_BACKING_FORMAT = 0xe279_2aca
export const EXT_FEATURE_TABLE = 0x6803_f857
export const EXT_BITMAPS = 0x2385_2875
export const EXT_DATA_FILE = 0x4441_5441

/** An entry of the feature name table: the type of feature, its bit, its name padded with zeros. */
export const FEATURE_ENTRY_SIZE = 48
export const FEATURE_INCOMPATIBLE = 0
export const FEATURE_COMPATIBLE = 1
export const FEATURE_AUTOCLEAR = 2

/** Bytes of an entry of the L1 and refcount tables and of a standard L2 table, and of an extended L2 entry. */
export const ENTRY_SIZE = 8
export const EXTENDED_ENTRY_SIZE = 16

/** Subclusters of a cluster, with extended L2 entries, and the smallest clusters that have them. */
export const SUBCLUSTERS = 32
export const MIN_CLUSTER_BITS_EXTL2 = 14
/** Byte offsets within an extended entry of its two bitmaps: the subclusters that read as zeros, and those allocated. */
export const SUBCLUSTERS_ZERO = 8
export const SUBCLUSTERS_ALLOCATED = 12

/** In the high half of an entry: bit 63, the refcount is exactly one; bit 62, compressed. */
export const OFLAG_COPIED_HIGH = 0x8000_0000
export const OFLAG_COMPRESSED_HIGH = 0x4000_0000
/** In the low half: bit 0, the cluster reads as zeros. */
export const OFLAG_ZERO_LOW = 1

/** Bits 9 to 55, the offset in the halves of a standard entry, and the reserved bits around it. */
export const OFFSET_HIGH = 0x00ff_ffff
export const OFFSET_LOW = 0xffff_fe00
export const L1_RESERVED_HIGH = 0x7f00_0000
export const L1_RESERVED_LOW = 0x0000_01ff
export const L2_RESERVED_HIGH = 0x3f00_0000
export const L2_RESERVED_LOW = 0x0000_01fe
export const EXTENDED_L2_RESERVED_LOW = 0x0000_01ff
/** Bits 0 to 8 of a refcount table entry are reserved; the others are the block's offset. */
export const REFT_RESERVED_LOW = 0x0000_01ff

/** Reserved bits of an entry of a bitmap table, in its halves, and the bit that says "all ones" of one without an offset. */
export const BITMAP_TABLE_RESERVED_HIGH = 0xff00_0000
export const BITMAP_TABLE_RESERVED_LOW = 0x0000_01fe
export const BITMAP_TABLE_ONES_LOW = 1

/** Compressed data is counted in sectors of this many bytes. */
export const COMPRESSED_SECTOR = 512

/** Byte offsets in the fixed part of a snapshot table entry, and its length. Extra data follow, then id and name. */
export const SNAPSHOT = {
  l1_table_offset: 0,
  l1_size: 8,
  id_str_size: 12,
  name_size: 14,
  date_sec: 16,
  date_nsec: 20,
  vm_clock_nsec: 24,
  vm_state_size: 32,
  extra_data_size: 36,
} as const
export const SNAPSHOT_LENGTH = 40
/** Byte offsets in a snapshot's extra data, and their length as far as it is known. */
export const SNAPSHOT_EXTRA = { vm_state_size_large: 0, disk_size: 8, icount: 16 } as const
export const SNAPSHOT_EXTRA_LENGTH = 24

/** Byte offsets in the data of the bitmaps extension, and their length. */
export const BITMAPS_EXTENSION = { nb_bitmaps: 0, bitmap_directory_size: 8, bitmap_directory_offset: 16 } as const
export const BITMAPS_EXTENSION_LENGTH = 24

/** Byte offsets in the fixed part of a bitmap directory entry, and its length. Extra data follow, then the name. */
export const BITMAP = {
  bitmap_table_offset: 0,
  bitmap_table_size: 8,
  flags: 12,
  type: 16,
  granularity_bits: 17,
  name_size: 18,
  extra_data_size: 20,
} as const
export const BITMAP_LENGTH = 24
export const BITMAP_TYPE_DIRTY = 1
/** Flags of a bitmap. */
export const BITMAP_IN_USE = 1
export const BITMAP_AUTO = 2
export const BITMAP_EXTRA_DATA_COMPATIBLE = 4
export const BITMAP_RESERVED_FLAGS = 0xffff_fff8
/** QEMU's own limits of a bitmap's granularity and name. */
export const MIN_GRANULARITY_BITS = 9
export const MAX_GRANULARITY_BITS = 31
export const MAX_BITMAP_NAME = 1023

const TWO_32 = 0x1_0000_0000

/** The offset that the halves of a standard entry hold. Above 2^53 it is not exact, and beyond the end of any file. */
export function entryOffset(high: number, low: number): number {
  return (high & OFFSET_HIGH) * TWO_32 + ((low & OFFSET_LOW) >>> 0)
}

/** Where a compressed cluster's data begins. `clusterBits` says how many bits of the entry are the offset. */
export function compressedOffset(high: number, low: number, clusterBits: number): number {
  return (high & ((1 << (62 - (clusterBits - 8) - 32)) - 1)) * TWO_32 + low
}

/** How many bytes from there the data may take: to the end of its last sector. */
export function compressedLength(high: number, low: number, clusterBits: number): number {
  const sectors = ((high & 0x3fff_ffff) >>> (62 - (clusterBits - 8) - 32)) + 1
  return sectors * COMPRESSED_SECTOR - (low % COMPRESSED_SECTOR)
}

/** The high half of the entry for `length` compressed bytes at `host`; the low half is the offset's. */
export function compressedEntryHigh(host: number, length: number, clusterBits: number): number {
  const sectors = Math.floor((host + length - 1) / COMPRESSED_SECTOR) - Math.floor(host / COMPRESSED_SECTOR)
  const shift = 62 - (clusterBits - 8) - 32
  return (OFLAG_COMPRESSED_HIGH | (sectors << shift) | Math.floor(host / TWO_32)) >>> 0
}
