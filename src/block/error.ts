// The one class of operating errors. Callers decide by `kind`, never by text; every border (NBD errno, HTTP status,
// exit code) is a total table over the kinds, so that a new kind does not compile until each border answers for it.

export const ERROR_KINDS = [
  'io', // the storage below failed
  'no-space', // a file system, a budget or a repository is full
  'out-of-range', // an offset or length outside the device
  'read-only', // a write to what may not be written
  'unsupported', // valid, but Varve does not do it
  'invalid-format', // an image, log or repository that is not what it was said to be
  'corrupt', // data that was right once: a checksum or a table is wrong
  'invalid-argument', // a request, option or name that cannot be right
  'not-found',
  'exists',
  'busy', // locked or in use by somebody else
  'closed',
  'cancelled',
  'timeout',
  'permission', // the operating system or a policy refuses
  'protocol', // a peer broke the rules of the wire
] as const

export type ErrorKind = (typeof ERROR_KINDS)[number]

/** Where it happened: whatever of this is known. Offsets and lengths in bytes. */
export interface Place {
  readonly device?: string
  readonly path?: string
  readonly offset?: number
  readonly length?: number
}

export class BlockError extends Error {
  override readonly name = 'BlockError'
  readonly kind: ErrorKind
  readonly place: Place

  constructor(kind: ErrorKind, message: string, place: Place = {}, cause?: unknown) {
    super(message, cause === undefined ? undefined : { cause })
    this.kind = kind
    this.place = place
  }
}

/** True for an operating error, of `kind` when that is given. */
export function isBlockError(error: unknown, kind?: ErrorKind): error is BlockError {
  return error instanceof BlockError && (kind === undefined || error.kind === kind)
}

const ERRNO_KIND: Readonly<Record<string, ErrorKind>> = {
  ENOSPC: 'no-space',
  EDQUOT: 'no-space',
  EFBIG: 'no-space',
  ENOENT: 'not-found',
  ENOTDIR: 'not-found',
  EEXIST: 'exists',
  EACCES: 'permission',
  EPERM: 'permission',
  EROFS: 'read-only',
  EBUSY: 'busy',
  ETXTBSY: 'busy',
  EAGAIN: 'busy',
  EOPNOTSUPP: 'unsupported',
  ENOSYS: 'unsupported',
  EINVAL: 'invalid-argument',
  EISDIR: 'invalid-argument',
  ENAMETOOLONG: 'invalid-argument',
  ETIMEDOUT: 'timeout',
}

/** Turns an error of Node's file system or network calls into a BlockError; a BlockError passes as it is. */
export function toBlockError(error: unknown, doing: string, place: Place = {}): BlockError {
  if (error instanceof BlockError) return error
  const code = (error as NodeJS.ErrnoException | undefined)?.code
  const kind = (code === undefined ? undefined : ERRNO_KIND[code]) ?? 'io'
  return new BlockError(kind, `${doing}: ${plainText(error)}`, place, error)
}

/** Node says "ENOENT: no such file or directory, open '/a'"; the caller says where and what better than its end does. */
function plainText(error: unknown): string {
  const text = error instanceof Error ? error.message : String(error)
  return /^E[A-Z0-9]+: (.+?), [a-z]+( '.*')?$/s.exec(text)?.[1] ?? text
}
