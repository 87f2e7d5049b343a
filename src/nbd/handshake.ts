// The handshake phase of one connection, server's side: fixed newstyle negotiation ("Newstyle negotiation", "Option types").
// Takes complete options from the receiver, answers in the outbox, and ends with a Session or a reason to hang up.
// Knows no sockets and no time limits.
//
//   server: greeting    client: flags    then, until GO, EXPORT_NAME or ABORT:   client: option   server: replies

import { getUint16, getUint32, setUint16, setUint32, setUint64, utf8 } from '../base/bytes.ts'
import { NBD_OPTION_MAX, REQUEST_MAX } from '../base/limits.ts'
import type { Pending } from '../block/device.ts'
import { type Export, type MetaContext, type SelectedContext, type Session, transmissionFlags } from './export.ts'
import type { Outbox } from './outbox.ts'
import type { Receiver } from './receiver.ts'
import type { SpliceStart } from './splice.ts'
import {
  BASE_ALLOCATION,
  DEFAULT_PREFERRED_BLOCK,
  EXPORT_NAME_ZEROES,
  GREETING_SIZE,
  NBD_FLAG_C_FIXED_NEWSTYLE,
  NBD_FLAG_C_NO_ZEROES,
  NBD_FLAG_FIXED_NEWSTYLE,
  NBD_FLAG_NO_ZEROES,
  NBD_INFO_BLOCK_SIZE,
  NBD_INFO_DESCRIPTION,
  NBD_INFO_EXPORT,
  NBD_INFO_NAME,
  NBD_MAGIC,
  NBD_MAX_STRING,
  NBD_OPT_ABORT,
  NBD_OPT_EXPORT_NAME,
  NBD_OPT_GO,
  NBD_OPT_INFO,
  NBD_OPT_LIST,
  NBD_OPT_LIST_META_CONTEXT,
  NBD_OPT_SET_META_CONTEXT,
  NBD_OPT_STARTTLS,
  NBD_OPT_STRUCTURED_REPLY,
  NBD_OPTS_MAGIC,
  NBD_REP_ACK,
  NBD_REP_ERR_BLOCK_SIZE_REQD,
  NBD_REP_ERR_INVALID,
  NBD_REP_ERR_POLICY,
  NBD_REP_ERR_SHUTDOWN,
  NBD_REP_ERR_TLS_REQD,
  NBD_REP_ERR_TOO_BIG,
  NBD_REP_ERR_UNKNOWN,
  NBD_REP_ERR_UNSUP,
  NBD_REP_INFO,
  NBD_REP_MAGIC,
  NBD_REP_META_CONTEXT,
  NBD_REP_SERVER,
  OPTION_REPLY_SIZE,
  OPTION_SIZE,
} from './spec.ts'
import { textOf, wireText } from './wire-text.ts'

/** What a server has to offer. */
export interface ExportList {
  /** The export of a name; the empty name asks for the default export. */
  find(name: string): Export | undefined
  list(): readonly Pick<Export, 'name' | 'description'>[]
  /** Where clients of an export are passed on that is served elsewhere, or why they are not; `enters` when the client asks to use it. */
  route?(name: string, enters: boolean): Route | { readonly refused: string } | undefined
}

/** Where an export is served. */
export interface Route {
  /** A Unix socket. */
  readonly socket: string
  /** The client is not passed on before this is done. */
  readonly after: Pending
}

/** How far the handshake came: it waits for more bytes, goes on over TLS or elsewhere, is over, or ends the connection. */
export type HandshakeOutcome =
  | { readonly kind: 'more' }
  | { readonly kind: 'start-tls' }
  | { readonly kind: 'enter'; readonly session: Session }
  | ({ readonly kind: 'pass-on' } & PassOn)
  | { readonly kind: 'hang-up' }

/** An option for whoever serves the export that it names. It is still in the receiver. */
export interface PassOn extends SpliceStart, Route {
  /** Bytes of the option. */
  readonly length: number
  /** True when no other option follows: EXPORT_NAME. */
  readonly isLast: boolean
}

const MORE: HandshakeOutcome = { kind: 'more' }
const HANG_UP: HandshakeOutcome = { kind: 'hang-up' }
const START_TLS: HandshakeOutcome = { kind: 'start-tls' }

/**
 * What TLS is on this connection ("TLS support", modes NOTLS and FORCEDTLS): never there, asked for before all else, or
 * begun.
 */
export type TlsPhase = 'none' | 'required' | 'begun'

/** What a client may ask for before TLS where it is required; EXPORT_NAME cannot be refused, so it ends the connection. */
const BEFORE_TLS = new Set([NBD_OPT_ABORT, NBD_OPT_STARTTLS, NBD_OPT_EXPORT_NAME])

/** Options that name an export. */
const NAMING = new Set([
  NBD_OPT_EXPORT_NAME,
  NBD_OPT_INFO,
  NBD_OPT_GO,
  NBD_OPT_LIST_META_CONTEXT,
  NBD_OPT_SET_META_CONTEXT,
])

/** Options that have no data. */
const WITHOUT_DATA = new Set([NBD_OPT_LIST, NBD_OPT_STARTTLS, NBD_OPT_STRUCTURED_REPLY])

/** The option is syntactically invalid: answered with NBD_REP_ERR_INVALID. */
class MalformedOption extends Error {}

/** Reads the data of one option and never past it. */
class OptionData {
  readonly #bytes: Uint8Array
  #at: number
  readonly #end: number

  constructor(bytes: Uint8Array, at: number, length: number) {
    this.#bytes = bytes
    this.#at = at
    this.#end = at + length
  }

  get left(): number {
    return this.#end - this.#at
  }

  uint16(): number {
    return getUint16(this.#bytes, this.#take(2))
  }

  uint32(): number {
    return getUint32(this.#bytes, this.#take(4))
  }

  text(length: number): string {
    const at = this.#take(length)
    const text = textOf(this.#bytes.subarray(at, at + length))
    if (text === undefined)
      throw new MalformedOption(`a string is UTF-8 of at most ${NBD_MAX_STRING} bytes, without NUL`)
    return text
  }

  finish(): void {
    if (this.left > 0) throw new MalformedOption(`${this.left} bytes too many`)
  }

  #take(count: number): number {
    if (count > this.left) throw new MalformedOption('the data ends too early')
    const at = this.#at
    this.#at += count
    return at
  }
}

type OptionHandler = (option: number, data: OptionData) => HandshakeOutcome

export class Handshake {
  readonly #exports: ExportList
  #outbox: Outbox
  #tls: TlsPhase
  #flags: number | undefined
  /** Bytes of an option that was too big, still to be thrown away. */
  #skip = 0
  #structured = false
  #isShutDown = false
  #selected: { readonly exportName: string; readonly contexts: readonly SelectedContext[] } | undefined

  readonly #handlers: Readonly<Record<number, OptionHandler>> = {
    [NBD_OPT_EXPORT_NAME]: (_option, data) => this.#exportName(data),
    [NBD_OPT_ABORT]: (option) => this.#abort(option),
    [NBD_OPT_LIST]: (option, data) => this.#list(option, data),
    [NBD_OPT_STARTTLS]: (option, data) => this.#startTls(option, data),
    [NBD_OPT_INFO]: (option, data) => this.#info(option, data),
    [NBD_OPT_GO]: (option, data) => this.#info(option, data),
    [NBD_OPT_STRUCTURED_REPLY]: (option, data) => {
      data.finish()
      this.#structured = true
      return this.#reply(option, NBD_REP_ACK)
    },
    [NBD_OPT_LIST_META_CONTEXT]: (option, data) => this.#metaContext(option, data),
    [NBD_OPT_SET_META_CONTEXT]: (option, data) => this.#metaContext(option, data),
  }

  /** Sends the greeting. */
  constructor(exports: ExportList, outbox: Outbox, tls: TlsPhase = 'none') {
    this.#exports = exports
    this.#outbox = outbox
    this.#tls = tls
    const at = outbox.reserve(GREETING_SIZE)
    for (const [i, word] of [...NBD_MAGIC, ...NBD_OPTS_MAGIC].entries()) setUint32(outbox.bytes, at + i * 4, word)
    setUint16(outbox.bytes, at + 16, NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES)
    outbox.commit(GREETING_SIZE)
  }

  /** TLS has begun: goes on with the same client over another outbox. */
  secured(outbox: Outbox): void {
    this.#outbox = outbox
    this.#tls = 'begun'
  }

  /** The server ends: from here on every option but ABORT is refused with that reason. */
  shutDown(): void {
    this.#isShutDown = true
  }

  /** Handles the complete options in the receiver. */
  consume(receiver: Receiver): HandshakeOutcome {
    if (this.#flags === undefined) {
      if (receiver.length < 4) return MORE
      this.#flags = getUint32(receiver.bytes, receiver.start)
      receiver.start += 4
      if ((this.#flags & ~(NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES)) !== 0) return HANG_UP
      // Without fixed newstyle there is no way to TLS, nor to say so ("TLS support").
      if (this.#tls === 'required' && (this.#flags & NBD_FLAG_C_FIXED_NEWSTYLE) === 0) return HANG_UP
    }
    for (;;) {
      const skipped = Math.min(this.#skip, receiver.length)
      this.#skip -= skipped
      receiver.start += skipped
      const outcome = this.#skip > 0 ? undefined : this.#nextOption(receiver)
      if (outcome === undefined) return MORE
      if (outcome.kind !== 'more') return outcome
    }
  }

  /** Undefined when the next option is not complete. */
  #nextOption(receiver: Receiver): HandshakeOutcome | undefined {
    if (receiver.length < OPTION_SIZE) return undefined
    const { bytes, start } = receiver
    if (getUint32(bytes, start) !== NBD_OPTS_MAGIC[0] || getUint32(bytes, start + 4) !== NBD_OPTS_MAGIC[1])
      return HANG_UP
    const option = getUint32(bytes, start + 8)
    const length = getUint32(bytes, start + 12)
    if (length > NBD_OPTION_MAX) {
      receiver.start += OPTION_SIZE
      this.#skip = length
      return this.#tooLong(option)
    }
    if (receiver.length < OPTION_SIZE + length) return undefined
    receiver.start += OPTION_SIZE + length
    if (this.#isTooLate(option)) return this.#refuseLate(option)
    const handler = this.#handlers[option]
    if (handler === undefined || this.#awaitsTls(option)) return this.#refuseUnread(option)
    const elsewhere = this.#routeOf(option, bytes, start + OPTION_SIZE, length)
    if (elsewhere !== undefined) {
      // The option itself is for whoever serves the export.
      if (elsewhere.kind === 'pass-on') receiver.start = start
      if (option === NBD_OPT_SET_META_CONTEXT) this.#selected = undefined
      return elsewhere
    }
    try {
      return handler(option, new OptionData(bytes, start + OPTION_SIZE, length))
    } catch (error) {
      if (!(error instanceof MalformedOption)) throw error
      if (option === NBD_OPT_EXPORT_NAME) return HANG_UP
      return this.#refuse(option, NBD_REP_ERR_INVALID, error.message)
    }
  }

  /** What TLS must come before is told so all the same: nothing else is said in the clear. */
  #isTooLate(option: number): boolean {
    return this.#isShutDown && option !== NBD_OPT_ABORT && !this.#awaitsTls(option)
  }

  #refuseLate(option: number): HandshakeOutcome {
    if (option === NBD_OPT_EXPORT_NAME) return HANG_UP
    return this.#refuse(option, NBD_REP_ERR_SHUTDOWN, 'the server is being shut down')
  }

  #awaitsTls(option: number): boolean {
    return this.#tls === 'required' && !BEFORE_TLS.has(option)
  }

  /** The answer to an option that comes before TLS, or that nobody here knows, whatever its data is. */
  #refuseUnread(option: number): HandshakeOutcome {
    if (this.#awaitsTls(option))
      return this.#refuse(option, NBD_REP_ERR_TLS_REQD, 'TLS is required here: NBD_OPT_STARTTLS comes first')
    return this.#refuse(option, NBD_REP_ERR_UNSUP, `option ${option} is not known here`)
  }

  /** The answer to an option whose data is thrown away. */
  #tooLong(option: number): HandshakeOutcome {
    if (option === NBD_OPT_EXPORT_NAME) return HANG_UP
    if (option === NBD_OPT_ABORT) return this.#abort(option)
    if (this.#isTooLate(option)) return this.#refuseLate(option)
    if (this.#handlers[option] === undefined || this.#awaitsTls(option)) return this.#refuseUnread(option)
    if (WITHOUT_DATA.has(option)) return this.#refuse(option, NBD_REP_ERR_INVALID, 'this option has no data')
    if (option === NBD_OPT_SET_META_CONTEXT) this.#selected = undefined
    return this.#refuse(option, NBD_REP_ERR_TOO_BIG, `an option has at most ${NBD_OPTION_MAX} bytes here`)
  }

  /** Whatever data came with it is ignored. */
  #abort(option: number): HandshakeOutcome {
    this.#reply(option, NBD_REP_ACK)
    return HANG_UP
  }

  /** Where the export lives that an option names, when that is not here. */
  #routeOf(option: number, bytes: Uint8Array, at: number, length: number): HandshakeOutcome | undefined {
    if (this.#exports.route === undefined || !NAMING.has(option)) return undefined
    const isBare = option === NBD_OPT_EXPORT_NAME
    const nameLength = isBare ? length : length < 4 ? -1 : getUint32(bytes, at)
    const nameAt = isBare ? at : at + 4
    if (nameLength < 0 || nameAt + nameLength > at + length) return undefined
    const name = utf8.decode(bytes.subarray(nameAt, nameAt + nameLength))
    const route = this.#exports.route(name, isBare || option === NBD_OPT_GO)
    if (route === undefined) return undefined
    if ('refused' in route) return isBare ? HANG_UP : this.#refuse(option, NBD_REP_ERR_POLICY, route.refused)
    const agreed = { clientFlags: this.#flags ?? 0, structured: this.#structured }
    return { kind: 'pass-on', ...route, ...agreed, length: OPTION_SIZE + length, isLast: isBare }
  }

  #startTls(option: number, data: OptionData): HandshakeOutcome {
    data.finish()
    if (this.#tls === 'none') return this.#refuse(option, NBD_REP_ERR_UNSUP, 'TLS is not available here')
    if (this.#tls === 'begun') throw new MalformedOption('TLS has begun already')
    this.#reply(option, NBD_REP_ACK)
    return START_TLS
  }

  /** The only option that cannot be answered with an error: what cannot be served ends the connection. */
  #exportName(data: OptionData): HandshakeOutcome {
    if (this.#tls === 'required') return HANG_UP
    const name = data.text(data.left)
    const found = this.#exports.find(name)
    if (found === undefined || found.device.can.minimumBlock > 1) return HANG_UP
    const zeroes = (this.#flags ?? 0) & NBD_FLAG_C_NO_ZEROES ? 0 : EXPORT_NAME_ZEROES
    const at = this.#outbox.reserve(10 + zeroes)
    setUint64(this.#outbox.bytes, at, found.device.size)
    setUint16(this.#outbox.bytes, at + 8, transmissionFlags(found, this.#structured))
    this.#outbox.bytes.fill(0, at + 10, at + 10 + zeroes)
    this.#outbox.commit(10 + zeroes)
    return this.#enter(name, found)
  }

  #list(option: number, data: OptionData): HandshakeOutcome {
    data.finish()
    for (const { name, description } of this.#exports.list()) {
      const bytes = utf8.encode(name)
      const details = utf8.encode(description ?? '')
      const payload = new Uint8Array(4 + bytes.length + details.length)
      setUint32(payload, 0, bytes.length)
      payload.set(bytes, 4)
      payload.set(details, 4 + bytes.length)
      this.#reply(option, NBD_REP_SERVER, payload)
    }
    return this.#reply(option, NBD_REP_ACK)
  }

  /** NBD_OPT_INFO and NBD_OPT_GO: the same answers, but GO enters transmission. */
  #info(option: number, data: OptionData): HandshakeOutcome {
    const name = data.text(data.uint32())
    const wanted = new Set<number>()
    for (let count = data.uint16(); count > 0; count--) wanted.add(data.uint16())
    data.finish()
    const found = this.#exports.find(name)
    if (found === undefined) return this.#refuse(option, NBD_REP_ERR_UNKNOWN, `there is no export named "${name}"`)
    const { minimumBlock, bestBlock } = found.device.can
    const isBlockSizeMissing = minimumBlock > 1 && !wanted.has(NBD_INFO_BLOCK_SIZE)
    if (wanted.has(NBD_INFO_BLOCK_SIZE) || isBlockSizeMissing) {
      const payload = infoPayload(NBD_INFO_BLOCK_SIZE, 12)
      setUint32(payload, 2, minimumBlock)
      setUint32(payload, 6, Math.min(Math.max(bestBlock, minimumBlock, DEFAULT_PREFERRED_BLOCK), REQUEST_MAX))
      setUint32(payload, 10, REQUEST_MAX)
      this.#reply(option, NBD_REP_INFO, payload)
    }
    if (option === NBD_OPT_GO && isBlockSizeMissing) {
      const why = `requests must be multiples of ${minimumBlock} bytes; ask for NBD_INFO_BLOCK_SIZE`
      return this.#refuse(option, NBD_REP_ERR_BLOCK_SIZE_REQD, why)
    }
    const payload = infoPayload(NBD_INFO_EXPORT, 10)
    setUint64(payload, 2, found.device.size)
    setUint16(payload, 10, transmissionFlags(found, this.#structured))
    this.#reply(option, NBD_REP_INFO, payload)
    if (wanted.has(NBD_INFO_NAME)) this.#reply(option, NBD_REP_INFO, infoText(NBD_INFO_NAME, found.name))
    if (wanted.has(NBD_INFO_DESCRIPTION) && found.description !== undefined) {
      this.#reply(option, NBD_REP_INFO, infoText(NBD_INFO_DESCRIPTION, found.description))
    }
    this.#reply(option, NBD_REP_ACK)
    return option === NBD_OPT_GO ? this.#enter(name, found) : MORE
  }

  /** NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT ("Metadata querying"). */
  #metaContext(option: number, data: OptionData): HandshakeOutcome {
    const isSet = option === NBD_OPT_SET_META_CONTEXT
    if (isSet) this.#selected = undefined
    const exportName = data.text(data.uint32())
    const queries: string[] = []
    for (let count = data.uint32(); count > 0; count--) queries.push(data.text(data.uint32()))
    data.finish()
    if (isSet && !this.#structured) throw new MalformedOption('structured replies come first')
    if (queries.some((query) => !query.includes(':'))) throw new MalformedOption('a query is NAMESPACE:NAME')
    const found = this.#exports.find(exportName)
    if (found === undefined)
      return this.#refuse(option, NBD_REP_ERR_UNKNOWN, `there is no export named "${exportName}"`)
    const wildcards = isSet ? [] : [...new Set(queries)].filter((query) => query.endsWith(':'))
    const matches = (name: string): boolean =>
      queries.includes(name) || wildcards.some((query) => name.startsWith(query))
    const all = [baseAllocation(found), ...(found.contexts ?? [])].map((context, id) => ({ id, context }))
    const contexts = queries.length === 0 && !isSet ? all : all.filter(({ context }) => matches(context.name))
    for (const { id, context } of contexts) {
      const name = utf8.encode(context.name)
      const payload = new Uint8Array(4 + name.length)
      setUint32(payload, 0, isSet ? id : 0)
      payload.set(name, 4)
      this.#reply(option, NBD_REP_META_CONTEXT, payload)
    }
    if (isSet) this.#selected = { exportName, contexts }
    return this.#reply(option, NBD_REP_ACK)
  }

  /** Contexts that were selected for another export do not count. */
  #enter(name: string, found: Export): HandshakeOutcome {
    const contexts = this.#selected?.exportName === name ? this.#selected.contexts : []
    return { kind: 'enter', session: { export: found, structured: this.#structured, contexts } }
  }

  #refuse(option: number, error: number, message: string): HandshakeOutcome {
    return this.#reply(option, error, wireText(message))
  }

  #reply(option: number, type: number, payload: Uint8Array = new Uint8Array(0)): HandshakeOutcome {
    const at = this.#outbox.reserve(OPTION_REPLY_SIZE + payload.length)
    const to = this.#outbox.bytes
    setUint32(to, at, NBD_REP_MAGIC[0])
    setUint32(to, at + 4, NBD_REP_MAGIC[1])
    setUint32(to, at + 8, option)
    setUint32(to, at + 12, type)
    setUint32(to, at + 16, payload.length)
    to.set(payload, at + OPTION_REPLY_SIZE)
    this.#outbox.commit(OPTION_REPLY_SIZE + payload.length)
    return MORE
  }
}

function infoPayload(type: number, length: number): Uint8Array {
  const payload = new Uint8Array(2 + length)
  setUint16(payload, 0, type)
  return payload
}

function infoText(type: number, text: string): Uint8Array {
  const bytes = utf8.encode(text)
  const payload = infoPayload(type, bytes.length)
  payload.set(bytes, 2)
  return payload
}

/** The device's own extents; a device that cannot tell is all data, which the specification allows. */
function baseAllocation({ device }: Export): MetaContext {
  return {
    name: BASE_ALLOCATION,
    extents: (offset, length, visit) => {
      if (device.can.extents !== 'none') return device.extents(offset, length, visit)
      visit(length, 0)
      return undefined
    },
  }
}
