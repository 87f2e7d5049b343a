// The constants of the NBD protocol, with the names that its specification gives them (NetworkBlockDevice/nbd,
// doc/proto.md), and the two total tables between NBD's error numbers and Varve's error kinds. No logic.
//
//   request      magic 4 | command flags 2 | type 2 | cookie 8 | offset 8 | length 4 | WRITE: data
//   simple reply magic 4 | error 4 | cookie 8 | READ: data
//   reply chunk  magic 4 | flags 2 | type 2 | cookie 8 | length 4 | payload
//   option       magic 8 | option 4 | length 4 | data
//   option reply magic 8 | option 4 | type 4 | length 4 | data

import type { ErrorKind } from '../block/error.ts'

/** TCP port assigned to NBD. */
export const NBD_DEFAULT_PORT = 10_809

/** Longest string on the wire, in bytes ("Conventions"). */
export const NBD_MAX_STRING = 4096

// Magic numbers. Those of 64 bits are given as their two halves.
export const NBD_MAGIC = [0x4e42_444d, 0x4147_4943] as const // "NBDMAGIC"
export const NBD_OPTS_MAGIC = [0x4948_4156, 0x454f_5054] as const // "IHAVEOPT"
export const NBD_REP_MAGIC = [0x0003_e889, 0x0455_65a9] as const
export const NBD_REQUEST_MAGIC = 0x2560_9513
export const NBD_SIMPLE_REPLY_MAGIC = 0x6744_6698
export const NBD_STRUCTURED_REPLY_MAGIC = 0x668e_33ef

// Sizes of the fixed parts, in bytes.
export const GREETING_SIZE = 18
export const OPTION_SIZE = 16
export const OPTION_REPLY_SIZE = 20
export const REQUEST_SIZE = 28
export const SIMPLE_REPLY_SIZE = 16
export const CHUNK_SIZE = 20
/** Zero bytes after the reply to NBD_OPT_EXPORT_NAME, unless both sides agreed on NO_ZEROES. */
export const EXPORT_NAME_ZEROES = 124

// Handshake flags and client flags.
export const NBD_FLAG_FIXED_NEWSTYLE = 1
export const NBD_FLAG_NO_ZEROES = 2
export const NBD_FLAG_C_FIXED_NEWSTYLE = 1
export const NBD_FLAG_C_NO_ZEROES = 2

// Transmission flags.
export const NBD_FLAG_HAS_FLAGS = 1
export const NBD_FLAG_READ_ONLY = 1 << 1
export const NBD_FLAG_SEND_FLUSH = 1 << 2
export const NBD_FLAG_SEND_FUA = 1 << 3
export const NBD_FLAG_SEND_TRIM = 1 << 5
export const NBD_FLAG_SEND_WRITE_ZEROES = 1 << 6
export const NBD_FLAG_SEND_DF = 1 << 7
export const NBD_FLAG_CAN_MULTI_CONN = 1 << 8
export const NBD_FLAG_SEND_CACHE = 1 << 10
export const NBD_FLAG_SEND_FAST_ZERO = 1 << 11

// Options.
export const NBD_OPT_EXPORT_NAME = 1
export const NBD_OPT_ABORT = 2
export const NBD_OPT_LIST = 3
export const NBD_OPT_STARTTLS = 5
export const NBD_OPT_INFO = 6
export const NBD_OPT_GO = 7
export const NBD_OPT_STRUCTURED_REPLY = 8
export const NBD_OPT_LIST_META_CONTEXT = 9
export const NBD_OPT_SET_META_CONTEXT = 10

// Option replies; errors have the top bit.
export const NBD_REP_ACK = 1
export const NBD_REP_SERVER = 2
export const NBD_REP_INFO = 3
export const NBD_REP_META_CONTEXT = 4
export const NBD_REP_FLAG_ERROR = 0x8000_0000
export const NBD_REP_ERR_UNSUP = 0x8000_0001
export const NBD_REP_ERR_POLICY = 0x8000_0002
export const NBD_REP_ERR_INVALID = 0x8000_0003
export const NBD_REP_ERR_TLS_REQD = 0x8000_0005
export const NBD_REP_ERR_UNKNOWN = 0x8000_0006
export const NBD_REP_ERR_SHUTDOWN = 0x8000_0007
export const NBD_REP_ERR_BLOCK_SIZE_REQD = 0x8000_0008
export const NBD_REP_ERR_TOO_BIG = 0x8000_0009

// Information types of NBD_OPT_INFO and NBD_OPT_GO.
export const NBD_INFO_EXPORT = 0
export const NBD_INFO_NAME = 1
export const NBD_INFO_DESCRIPTION = 2
export const NBD_INFO_BLOCK_SIZE = 3

/** What a client may assume of block sizes that were not negotiated, in bytes ("Block size constraints"). */
export const DEFAULT_PREFERRED_BLOCK = 4096
export const DEFAULT_MAXIMUM_BLOCK = 32 * 1024 * 1024

// Commands.
export const NBD_CMD_READ = 0
export const NBD_CMD_WRITE = 1
export const NBD_CMD_DISC = 2
export const NBD_CMD_FLUSH = 3
export const NBD_CMD_TRIM = 4
export const NBD_CMD_CACHE = 5
export const NBD_CMD_WRITE_ZEROES = 6
export const NBD_CMD_BLOCK_STATUS = 7

// Command flags.
export const NBD_CMD_FLAG_FUA = 1
export const NBD_CMD_FLAG_NO_HOLE = 1 << 1
export const NBD_CMD_FLAG_DF = 1 << 2
export const NBD_CMD_FLAG_REQ_ONE = 1 << 3
export const NBD_CMD_FLAG_FAST_ZERO = 1 << 4

/** The flags that each command may carry; a command that is not here is unknown. FUA is valid on all of them. */
export const COMMAND_FLAGS: readonly (number | undefined)[] = [
  NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_DF, // READ
  NBD_CMD_FLAG_FUA, // WRITE
  NBD_CMD_FLAG_FUA, // DISC
  NBD_CMD_FLAG_FUA, // FLUSH
  NBD_CMD_FLAG_FUA, // TRIM
  NBD_CMD_FLAG_FUA, // CACHE
  NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO, // WRITE_ZEROES
  NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_REQ_ONE, // BLOCK_STATUS
]

// Structured replies.
export const NBD_REPLY_FLAG_DONE = 1
export const NBD_REPLY_TYPE_NONE = 0
export const NBD_REPLY_TYPE_OFFSET_DATA = 1
export const NBD_REPLY_TYPE_OFFSET_HOLE = 2
export const NBD_REPLY_TYPE_BLOCK_STATUS = 5
export const NBD_REPLY_TYPE_FLAG_ERROR = 0x8000
export const NBD_REPLY_TYPE_ERROR = 0x8001
export const NBD_REPLY_TYPE_ERROR_OFFSET = 0x8002

/** The metadata context that the specification itself defines; its bits are HOLE and ZERO. */
export const BASE_ALLOCATION = 'base:allocation'

// Error values.
export const NBD_EPERM = 1
export const NBD_EIO = 5
export const NBD_ENOMEM = 12
export const NBD_EINVAL = 22
export const NBD_ENOSPC = 28
export const NBD_EOVERFLOW = 75
export const NBD_ENOTSUP = 95
export const NBD_ESHUTDOWN = 108

/** What a server answers for each kind of error. ENOTSUP is kept for fast zeroing, as the specification asks. */
export const KIND_ERRNO: Readonly<Record<ErrorKind, number>> = {
  io: NBD_EIO,
  'no-space': NBD_ENOSPC,
  'out-of-range': NBD_EINVAL,
  'read-only': NBD_EPERM,
  unsupported: NBD_EINVAL,
  'invalid-format': NBD_EIO,
  corrupt: NBD_EIO,
  'invalid-argument': NBD_EINVAL,
  'not-found': NBD_EIO,
  exists: NBD_EIO,
  busy: NBD_EIO,
  closed: NBD_ESHUTDOWN,
  cancelled: NBD_ESHUTDOWN,
  timeout: NBD_EIO,
  permission: NBD_EPERM,
  protocol: NBD_EIO,
}

const ERRNO_KIND: Readonly<Record<number, ErrorKind>> = {
  [NBD_EPERM]: 'read-only',
  [NBD_EIO]: 'io',
  [NBD_ENOMEM]: 'io',
  [NBD_EINVAL]: 'invalid-argument',
  [NBD_ENOSPC]: 'no-space',
  [NBD_EOVERFLOW]: 'invalid-argument',
  [NBD_ENOTSUP]: 'unsupported',
  [NBD_ESHUTDOWN]: 'closed',
}

/** What a client makes of a server's error number; any number that it does not expect is as EINVAL ("Error values"). */
export function kindOfErrno(errno: number): ErrorKind {
  return ERRNO_KIND[errno] ?? 'invalid-argument'
}

/** The name of an option, for messages. */
export const OPTION_NAMES: Readonly<Record<number, string>> = {
  [NBD_OPT_EXPORT_NAME]: 'NBD_OPT_EXPORT_NAME',
  [NBD_OPT_ABORT]: 'NBD_OPT_ABORT',
  [NBD_OPT_LIST]: 'NBD_OPT_LIST',
  [NBD_OPT_STARTTLS]: 'NBD_OPT_STARTTLS',
  [NBD_OPT_INFO]: 'NBD_OPT_INFO',
  [NBD_OPT_GO]: 'NBD_OPT_GO',
  [NBD_OPT_STRUCTURED_REPLY]: 'NBD_OPT_STRUCTURED_REPLY',
  [NBD_OPT_LIST_META_CONTEXT]: 'NBD_OPT_LIST_META_CONTEXT',
  [NBD_OPT_SET_META_CONTEXT]: 'NBD_OPT_SET_META_CONTEXT',
}
