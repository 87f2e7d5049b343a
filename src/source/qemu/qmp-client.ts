// A client of QEMU's monitor (docs/interop/qmp-spec in QEMU) over the Unix socket of `-qmp`: commands with a time limit each, answers by
// their id, events, out-of-band commands where the monitor offers them. A monitor talks to one client at a time: be brief, and close.
// A connection that is lost fails what is under way, since nobody knows whether it was done, and comes back with the next command.
//
//   open -> connecting -> talking --lost--> lost --next command--> connecting
//                            +--close--> closed

import net from 'node:net'
import { QMP_COMMAND_MS, QMP_COMMANDS_MAX, QMP_GREETING_MS } from '../../base/qemu-limits.ts'
import { BlockError, type ErrorKind, toBlockError } from '../../block/error.ts'
import { checkSocketPath } from '../../nbd/uri.ts'
import { QmpLines } from './qmp-line.ts'

/** The classes of errors that QMP has (qapi/error.json); another one is 'io'. */
const KINDS: Readonly<Record<string, ErrorKind>> = {
  GenericError: 'io',
  CommandNotFound: 'unsupported',
  DeviceNotActive: 'closed',
  DeviceNotFound: 'not-found',
  KVMMissingCap: 'unsupported',
}

export interface QmpEvent {
  readonly event: string
  readonly data: Readonly<Record<string, unknown>>
}

export interface QmpVersion {
  readonly major: number
  readonly minor: number
  readonly micro: number
}

export interface QmpLimits {
  /** Milliseconds until the greeting, and until the answer to a command. */
  readonly greetingMs?: number
  readonly commandMs?: number
}

export interface CommandOptions {
  /** Milliseconds for this one. */
  readonly limitMs?: number
  /** Past the queue of commands, for the few that may be (`allow-oob` in the schema). Kind 'unsupported' where that is not offered. */
  readonly oob?: boolean
}

/** A command whose answer has not come. */
interface Asked {
  readonly command: string
  readonly timer: NodeJS.Timeout
  readonly resolve: (value: unknown) => void
  readonly reject: (error: BlockError) => void
}

type State =
  | { readonly at: 'talking'; readonly socket: net.Socket; readonly version: QmpVersion; readonly hasOob: boolean }
  | { readonly at: 'connecting'; readonly done: Promise<void> }
  | { readonly at: 'lost'; readonly error: BlockError }
  | { readonly at: 'closed' }

export class QmpClient {
  /** For messages. */
  readonly name: string
  readonly #path: string
  readonly #limits: Required<QmpLimits>
  readonly #asked = new Map<number, Asked>()
  readonly #watchers = new Set<(event: QmpEvent) => void>()
  #state: State
  #nextId = 1
  #connections = 0

  private constructor(path: string, { greetingMs = QMP_GREETING_MS, commandMs = QMP_COMMAND_MS }: QmpLimits) {
    this.name = `QEMU at ${path}`
    this.#path = path
    this.#limits = { greetingMs, commandMs }
    this.#state = { at: 'lost', error: new BlockError('closed', `${this.name}: not connected`) }
  }

  /**
   * Connects, and agrees on capabilities. Kinds: 'not-found' when nobody listens there, 'timeout' when nobody says anything (another
   * client has the monitor, or it is the guest agent's), 'protocol' for what is no QMP, 'permission', 'invalid-argument' for a path too long.
   */
  static async open(path: string, limits: QmpLimits = {}): Promise<QmpClient> {
    checkSocketPath(path)
    const client = new QmpClient(path, limits)
    await client.#talk()
    return client
  }

  get version(): QmpVersion {
    if (this.#state.at === 'talking') return this.#state.version
    throw this.#notTalking()
  }

  /** Whether out-of-band commands are taken. */
  get hasOob(): boolean {
    return this.#state.at === 'talking' && this.#state.hasOob
  }

  /** How often it was connected: when that grew, events may be missing, and the machine may be another. */
  get connections(): number {
    return this.#connections
  }

  /**
   * What the command returned. Kinds: by the class of QEMU's error; 'timeout' when no answer came in time, which may still be done;
   * 'closed' when the connection was lost or the client closed, 'busy' with too many under way.
   */
  async execute(command: string, args?: object, { limitMs, oob = false }: CommandOptions = {}): Promise<unknown> {
    await this.#talk()
    const state = this.#state
    if (state.at !== 'talking') throw this.#notTalking()
    if (oob && !state.hasOob)
      throw new BlockError('unsupported', `${this.name} takes no command out of band: ${command}`)
    return this.#ask(state.socket, command, args, { limitMs: limitMs ?? this.#limits.commandMs, oob })
  }

  /** Calls back for each event from now on, in order; returns how to stop that. */
  watch(listener: (event: QmpEvent) => void): () => void {
    this.#watchers.add(listener)
    return () => this.#watchers.delete(listener)
  }

  close(): void {
    const before = this.#state
    this.#state = { at: 'closed' }
    this.#failAll(new BlockError('closed', `${this.name}: the connection was closed`))
    if (before.at === 'talking') before.socket.destroy()
  }

  #talk(): Promise<void> {
    const state = this.#state
    switch (state.at) {
      case 'talking':
        return Promise.resolve()
      case 'connecting':
        return state.done
      case 'closed':
        return Promise.reject(this.#notTalking())
      case 'lost': {
        const done = this.#connect()
        this.#state = { at: 'connecting', done }
        return done
      }
    }
  }

  async #connect(): Promise<void> {
    const socket = net.connect({ path: this.#path })
    try {
      const greeting = await this.#greeting(socket)
      const { version, capabilities } = greetingOf(greeting, this.name)
      const hasOob = capabilities.includes('oob')
      const limitMs = this.#limits.greetingMs
      await this.#ask(socket, 'qmp_capabilities', hasOob ? { enable: ['oob'] } : {}, { limitMs, oob: false })
      if (this.#state.at === 'closed') throw this.#notTalking()
      this.#connections++
      this.#state = { at: 'talking', socket, version, hasOob }
    } catch (error) {
      socket.destroy()
      const failure = toBlockError(error, this.name)
      if (this.#state.at !== 'closed') this.#state = { at: 'lost', error: failure }
      throw failure
    }
  }

  /** The first line; all that come after it are answers and events. */
  #greeting(socket: net.Socket): Promise<Readonly<Record<string, unknown>>> {
    const lines = new QmpLines(this.name)
    return new Promise((resolve, reject) => {
      const silent = `${this.name} says nothing: does another program have the monitor, which talks to one at a time, or is it the guest agent's socket?`
      const timer = setTimeout(() => fail(new BlockError('timeout', silent)), this.#limits.greetingMs)
      let isGreeted = false
      const fail = (error: BlockError): void => {
        clearTimeout(timer)
        reject(error)
        this.#lose(socket, error)
      }
      socket.on('data', (data: Buffer) => {
        try {
          for (const line of lines.take(data)) {
            if (isGreeted) this.#hear(line)
            else {
              isGreeted = true
              clearTimeout(timer)
              resolve(line)
            }
          }
        } catch (error) {
          fail(toBlockError(error, this.name))
        }
      })
      socket.on('error', (error) => fail(this.#unreachable(error)))
      socket.on('close', () => fail(this.#hungUp()))
    })
  }

  #ask(
    socket: net.Socket,
    command: string,
    args: object | undefined,
    { limitMs, oob }: { readonly limitMs: number; readonly oob: boolean },
  ): Promise<unknown> {
    if (this.#asked.size >= QMP_COMMANDS_MAX)
      throw new BlockError('busy', `${this.name}: ${QMP_COMMANDS_MAX} commands wait for their answers already`)
    const id = this.#nextId++
    return new Promise((resolve, reject) => {
      const late = new BlockError('timeout', `${this.name} did not answer ${command} within ${limitMs} ms`)
      const timer = setTimeout(() => this.#answered(id)?.reject(late), limitMs)
      this.#asked.set(id, { command, timer, resolve, reject })
      const request = { [oob ? 'exec-oob' : 'execute']: command, ...(args && { arguments: args }), id }
      socket.write(`${JSON.stringify(request)}\n`)
    })
  }

  #hear(line: Readonly<Record<string, unknown>>): void {
    if (typeof line['event'] === 'string') {
      const event = { event: line['event'], data: (line['data'] ?? {}) as QmpEvent['data'] }
      for (const listener of this.#watchers) listener(event)
      return
    }
    const { id, error } = line as { readonly id?: unknown; readonly error?: { class?: unknown; desc?: unknown } }
    // One that came too late is nobody's any more.
    const asked = this.#answered(Number(id))
    if (asked === undefined) return
    if (error === undefined) asked.resolve(line['return'])
    else {
      const kind = KINDS[String(error.class)] ?? 'io'
      asked.reject(new BlockError(kind, `${this.name} refuses ${asked.command}: ${String(error.desc)}`))
    }
  }

  #answered(id: number): Asked | undefined {
    const asked = this.#asked.get(id)
    this.#asked.delete(id)
    clearTimeout(asked?.timer)
    return asked
  }

  #lose(socket: net.Socket, error: BlockError): void {
    socket.destroy()
    const { at } = this.#state
    if (at === 'closed' || (at === 'talking' && this.#state.socket !== socket)) return
    if (at === 'talking') this.#state = { at: 'lost', error }
    this.#failAll(error)
  }

  #failAll(error: BlockError): void {
    for (const id of this.#asked.keys()) this.#answered(id)?.reject(error)
  }

  #notTalking(): BlockError {
    const { name } = this
    return this.#state.at === 'lost'
      ? this.#state.error
      : new BlockError('closed', `${name}: the connection was closed`)
  }

  #hungUp(): BlockError {
    return new BlockError('closed', `${this.name} hung up: did the machine end?`)
  }

  #unreachable(error: Error): BlockError {
    const { code } = error as NodeJS.ErrnoException
    if (code === 'EPIPE' || code === 'ECONNRESET') return this.#hungUp()
    if (code !== 'ECONNREFUSED' && code !== 'ENOENT' && code !== 'ENOTSOCK') return toBlockError(error, this.name)
    const message = `nobody listens at ${this.#path}: does the machine run, and is that the socket of its -qmp?`
    return new BlockError('not-found', message, { path: this.#path }, error)
  }
}

function greetingOf(
  line: Readonly<Record<string, unknown>>,
  name: string,
): { readonly version: QmpVersion; readonly capabilities: readonly unknown[] } {
  const { QMP: greeting } = line as {
    readonly QMP?: { readonly version?: { readonly qemu?: QmpVersion }; readonly capabilities?: readonly unknown[] }
  }
  const version = greeting?.version?.qemu
  if (version !== undefined) return { version, capabilities: greeting?.capabilities ?? [] }
  const said = JSON.stringify(line).slice(0, 80)
  throw new BlockError('protocol', `${name} does not speak QMP: it said ${said}`)
}
