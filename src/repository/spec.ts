// The constants of the repository format, version 2, by the names of docs/internals/repository-format.md. Nothing here
// may change without a new version.

export const FORMAT_VERSION = 2

/** Bytes of a digest: SHA-256. */
export const ID_BYTES = 32

/** Unit of a disk's map, in bytes. */
export const GRANULE_BYTES = 4096
/** Longest plain data of one chunk, in bytes; a chunk never crosses a multiple of it on its disk. */
export const CHUNK_BYTES = 65_536
export const CHUNK_GRANULES = CHUNK_BYTES / GRANULE_BYTES

/** Children of a node, and granules of a leaf. */
export const FANOUT = 64
export const LEAF_BYTES = FANOUT * GRANULE_BYTES
/** Level of the highest node: 64^6 granules, 256 TiB. */
export const LEVEL_MAX = 5

export const LEAF_TAG = 0x4c
export const NODE_TAG = 0x4e
export const LEAF_HEADER_BYTES = 2
export const SEGMENT_BYTES = 3 + ID_BYTES
export const NODE_HEADER_BYTES = 10

/** Types of a blob. */
export const BLOB_CHUNK = 1
export const BLOB_NODE = 2
/** Codecs of a blob. */
export const CODEC_RAW = 0
export const CODEC_ZSTD = 1
/** Added to either of them when the form is locked. */
export const CODEC_LOCKED = 2

/** What encryption adds to the stored form of a blob: a nonce before it and a tag behind it, in bytes. */
export const NONCE_BYTES = 12
export const TAG_BYTES = 16
export const LOCK_BYTES = NONCE_BYTES + TAG_BYTES

export const PACK_MAGIC = 'VARVPACK'
export const PACK_TAIL_MAGIC = 'VARVTAIL'
export const PACK_HEADER_BYTES = 16
export const PACK_FOOTER_BYTES = 64
export const PACK_NAME_BYTES = 16
export const RECORD_BYTES = 48

export const INDEX_MAGIC = 'VARVINDX'
export const INDEX_HEADER_BYTES = 16
export const INDEX_PACK_BYTES = 24

/** Before an encrypted text. */
export const SEAL_MAGIC = 'VARVSEAL'

export const CONFIG_KEY = 'config'
export const PACKS = 'packs/'
export const INDEXES = 'index/'
export const BACKUPS = 'backups/'
/** Who is at work, what was forgotten, which packs are about to go, what is to be kept, and keys behind passphrases. */
export const SESSIONS = 'sessions/'
export const FORGOTTEN = 'forgotten/'
export const MARKS = 'marks/'
export const TAGS = 'tags/'
export const KEYS = 'keys/'
