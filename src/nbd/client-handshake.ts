// The handshake phase, client's side ("Fixed newstyle negotiation"): structured replies, metadata contexts, then GO, or
// EXPORT_NAME with servers that do not know GO. Runs once per connection, so it is written for reading, not for speed.

import { getUint16, getUint32, getUint64, MAX_SAFE, setUint16, setUint32, utf8 } from '../base/bytes.ts'
import { NBD_OPTION_MAX } from '../base/limits.ts'
import { isPowerOfTwo } from '../base/round.ts'
import { BlockError, type ErrorKind } from '../block/error.ts'
import {
  DEFAULT_MAXIMUM_BLOCK,
  DEFAULT_PREFERRED_BLOCK,
  EXPORT_NAME_ZEROES,
  GREETING_SIZE,
  NBD_FLAG_C_FIXED_NEWSTYLE,
  NBD_FLAG_C_NO_ZEROES,
  NBD_FLAG_FIXED_NEWSTYLE,
  NBD_FLAG_NO_ZEROES,
  NBD_INFO_BLOCK_SIZE,
  NBD_INFO_EXPORT,
  NBD_MAGIC,
  NBD_OPT_ABORT,
  NBD_OPT_EXPORT_NAME,
  NBD_OPT_GO,
  NBD_OPT_SET_META_CONTEXT,
  NBD_OPT_STARTTLS,
  NBD_OPT_STRUCTURED_REPLY,
  NBD_OPTS_MAGIC,
  NBD_REP_ACK,
  NBD_REP_ERR_POLICY,
  NBD_REP_ERR_SHUTDOWN,
  NBD_REP_ERR_TLS_REQD,
  NBD_REP_ERR_UNKNOWN,
  NBD_REP_ERR_UNSUP,
  NBD_REP_FLAG_ERROR,
  NBD_REP_INFO,
  NBD_REP_MAGIC,
  NBD_REP_META_CONTEXT,
  OPTION_NAMES,
  OPTION_REPLY_SIZE,
  OPTION_SIZE,
} from './spec.ts'

/** What the handshake needs of a connection. */
export interface Wire {
  /** For messages: the export's URI. */
  readonly name: string
  send(bytes: Uint8Array): void
  /** The next `count` bytes, for the caller to keep. Fails when the connection ends before. */
  receive(count: number): Promise<Uint8Array>
  /** Goes on over TLS; undefined where none is wanted. */
  readonly startTls?: (() => Promise<void>) | undefined
}

/** What the server told of its export. */
export interface ExportInfo {
  /** Bytes. */
  readonly size: number
  /** Transmission flags. */
  readonly flags: number
  readonly minimumBlock: number
  readonly bestBlock: number
  /** Longest read or write, in bytes. */
  readonly maximumBlock: number
  readonly structured: boolean
  /** Metadata contexts that the server selected, by name, with their numbers. */
  readonly contexts: ReadonlyMap<string, number>
}

interface OptionReply {
  readonly type: number
  readonly data: Uint8Array
}

const REFUSALS: Readonly<Record<number, readonly [ErrorKind, string]>> = {
  [NBD_REP_ERR_UNKNOWN]: ['not-found', 'the server has no export of that name'],
  [NBD_REP_ERR_POLICY]: ['permission', 'the server refuses'],
  [NBD_REP_ERR_TLS_REQD]: ['permission', 'the server insists on TLS: use a URI with nbds: or nbds+unix:'],
  [NBD_REP_ERR_UNSUP]: ['unsupported', 'the server does not know the option'],
  [NBD_REP_ERR_SHUTDOWN]: ['closed', 'the server is shutting down'],
}

export function violation(name: string, what: string): BlockError {
  return new BlockError('protocol', `${name}: the server broke the NBD protocol: ${what}`, { device: name })
}

/** Negotiates the export `exportName` and, as far as the server knows them, the metadata contexts. */
export async function negotiate(wire: Wire, exportName: string, contexts: readonly string[]): Promise<ExportInfo> {
  const flags = await greet(wire)
  if (wire.startTls !== undefined) {
    const { error } = await ask(wire, NBD_OPT_STARTTLS, new Uint8Array(0))
    // Never downgraded: whoever asked for TLS gets it or nothing.
    if (error !== undefined) return refused(wire, NBD_OPT_STARTTLS, error)
    await wire.startTls()
  }
  const structured = (await ask(wire, NBD_OPT_STRUCTURED_REPLY, new Uint8Array(0))).error === undefined
  const selected = structured ? await selectContexts(wire, exportName, contexts) : new Map<string, number>()
  const go = await ask(wire, NBD_OPT_GO, goData(exportName))
  const shared = { structured, contexts: selected }
  if (go.error === undefined) return { ...readInfo(wire, go.replies), ...shared }
  if (go.error.type !== NBD_REP_ERR_UNSUP) return refused(wire, NBD_OPT_GO, go.error)
  return { ...(await enterByName(wire, exportName, (flags & NBD_FLAG_NO_ZEROES) !== 0)), ...shared }
}

/** Reads the greeting and answers with our flags; returns the server's. */
async function greet(wire: Wire): Promise<number> {
  const greeting = await wire.receive(GREETING_SIZE)
  if (getUint32(greeting, 0) !== NBD_MAGIC[0] || getUint32(greeting, 4) !== NBD_MAGIC[1]) {
    throw violation(wire.name, 'it did not greet as an NBD server')
  }
  const flags = getUint16(greeting, 16)
  const isNewstyle = getUint32(greeting, 8) === NBD_OPTS_MAGIC[0] && getUint32(greeting, 12) === NBD_OPTS_MAGIC[1]
  if (!isNewstyle || (flags & NBD_FLAG_FIXED_NEWSTYLE) === 0) {
    throw new BlockError('unsupported', `${wire.name}: the server speaks an old form of NBD; fixed newstyle is needed`)
  }
  const answer = new Uint8Array(4)
  setUint32(answer, 0, NBD_FLAG_C_FIXED_NEWSTYLE | (flags & NBD_FLAG_NO_ZEROES ? NBD_FLAG_C_NO_ZEROES : 0))
  wire.send(answer)
  return flags
}

function sendOption(wire: Wire, option: number, data: Uint8Array): void {
  const message = new Uint8Array(OPTION_SIZE + data.length)
  setUint32(message, 0, NBD_OPTS_MAGIC[0])
  setUint32(message, 4, NBD_OPTS_MAGIC[1])
  setUint32(message, 8, option)
  setUint32(message, 12, data.length)
  message.set(data, OPTION_SIZE)
  wire.send(message)
}

interface Answer {
  /** The replies before the last. */
  readonly replies: readonly OptionReply[]
  /** The last one, when it is an error and not ACK. */
  readonly error: OptionReply | undefined
}

/** Sends an option and reads its replies up to the last. */
async function ask(wire: Wire, option: number, data: Uint8Array): Promise<Answer> {
  sendOption(wire, option, data)
  const replies: OptionReply[] = []
  let total = 0
  for (;;) {
    const reply = await receiveReply(wire, option)
    if (reply.type === NBD_REP_ACK) return { replies, error: undefined }
    if (reply.type === NBD_REP_ERR_SHUTDOWN) return refused(wire, option, reply)
    if (reply.type >= NBD_REP_FLAG_ERROR) return { replies, error: reply }
    replies.push(reply)
    total += OPTION_REPLY_SIZE + reply.data.length
    if (total > NBD_OPTION_MAX * 4) throw violation(wire.name, `too much in reply to ${OPTION_NAMES[option]}`)
  }
}

async function receiveReply(wire: Wire, option: number): Promise<OptionReply> {
  const header = await wire.receive(OPTION_REPLY_SIZE)
  const isReply = getUint32(header, 0) === NBD_REP_MAGIC[0] && getUint32(header, 4) === NBD_REP_MAGIC[1]
  if (!isReply || getUint32(header, 8) !== option) throw violation(wire.name, `no reply to ${OPTION_NAMES[option]}`)
  const type = getUint32(header, 12)
  const length = getUint32(header, 16)
  if (length > NBD_OPTION_MAX) throw violation(wire.name, `an option reply of ${length} bytes`)
  return { type, data: await wire.receive(length) }
}

/** Ends the session as a client must ("Termination of the session during option haggling"), and fails with the reason. */
async function refused(wire: Wire, option: number, { type, data }: OptionReply): Promise<never> {
  sendOption(wire, NBD_OPT_ABORT, new Uint8Array(0))
  // A server may close without a reply.
  await receiveReply(wire, NBD_OPT_ABORT).catch(() => undefined)
  const [kind, why] = REFUSALS[type] ?? (['protocol', `the server refuses ${OPTION_NAMES[option]}`] as const)
  const details = data.length > 0 ? ` (${utf8.decode(data)})` : ''
  throw new BlockError(kind, `${wire.name}: ${why}${details}`, { device: wire.name })
}

function goData(exportName: string): Uint8Array {
  const name = utf8.encode(exportName)
  const data = new Uint8Array(4 + name.length + 4)
  setUint32(data, 0, name.length)
  data.set(name, 4)
  setUint16(data, 4 + name.length, 1)
  setUint16(data, 6 + name.length, NBD_INFO_BLOCK_SIZE)
  return data
}

async function selectContexts(
  wire: Wire,
  exportName: string,
  contexts: readonly string[],
): Promise<Map<string, number>> {
  const strings = [exportName, ...contexts].map((text) => utf8.encode(text))
  const data = new Uint8Array(strings.reduce((sum, bytes) => sum + 4 + bytes.length, 4))
  let at = 0
  for (const [i, bytes] of strings.entries()) {
    setUint32(data, at, bytes.length)
    data.set(bytes, at + 4)
    at += 4 + bytes.length
    if (i > 0) continue
    // The number of queries follows the export's name.
    setUint32(data, at, contexts.length)
    at += 4
  }
  const { replies, error } = await ask(wire, NBD_OPT_SET_META_CONTEXT, data)
  const selected = new Map<string, number>()
  if (error !== undefined) return selected
  for (const reply of replies) {
    if (reply.type !== NBD_REP_META_CONTEXT || reply.data.length < 5) throw violation(wire.name, 'a bad context')
    selected.set(utf8.decode(reply.data.subarray(4)), getUint32(reply.data, 0))
  }
  return selected
}

type Sizes = Omit<ExportInfo, 'structured' | 'contexts'>

function checkedSize(wire: Wire, bytes: Uint8Array, at: number): number {
  const size = getUint64(bytes, at)
  if (size < 0) throw new BlockError('unsupported', `${wire.name}: the export is larger than ${MAX_SAFE} bytes`)
  return size
}

function readInfo(wire: Wire, replies: readonly OptionReply[]): Sizes {
  let size: number | undefined
  let flags = 0
  let [minimumBlock, bestBlock, maximumBlock] = [1, DEFAULT_PREFERRED_BLOCK, DEFAULT_MAXIMUM_BLOCK]
  for (const { type, data } of replies) {
    if (type !== NBD_REP_INFO || data.length < 2) throw violation(wire.name, 'a bad reply to NBD_OPT_GO')
    const info = getUint16(data, 0)
    if (info === NBD_INFO_EXPORT) {
      if (data.length !== 12) throw violation(wire.name, 'a bad NBD_INFO_EXPORT')
      size = checkedSize(wire, data, 2)
      flags = getUint16(data, 10)
    } else if (info === NBD_INFO_BLOCK_SIZE) {
      if (data.length !== 14) throw violation(wire.name, 'a bad NBD_INFO_BLOCK_SIZE')
      minimumBlock = getUint32(data, 2)
      bestBlock = getUint32(data, 6)
      maximumBlock = Math.min(getUint32(data, 10), DEFAULT_MAXIMUM_BLOCK)
    }
  }
  if (size === undefined) throw violation(wire.name, 'no NBD_INFO_EXPORT')
  const isSane =
    isPowerOfTwo(minimumBlock) && minimumBlock <= 65_536 && isPowerOfTwo(bestBlock) && maximumBlock >= minimumBlock
  if (!isSane) throw violation(wire.name, `block sizes ${minimumBlock}, ${bestBlock}, ${maximumBlock}`)
  maximumBlock -= maximumBlock % minimumBlock
  return { size, flags, minimumBlock, bestBlock, maximumBlock }
}

async function enterByName(wire: Wire, exportName: string, noZeroes: boolean): Promise<Sizes> {
  sendOption(wire, NBD_OPT_EXPORT_NAME, utf8.encode(exportName))
  const reply = await wire.receive(10 + (noZeroes ? 0 : EXPORT_NAME_ZEROES))
  const size = checkedSize(wire, reply, 0)
  const sizes = { minimumBlock: 1, bestBlock: DEFAULT_PREFERRED_BLOCK, maximumBlock: DEFAULT_MAXIMUM_BLOCK }
  return { size, flags: getUint16(reply, 8), ...sizes }
}
