// One call of the QEMU guest agent, over the Unix socket that QEMU has for it (qemu-ga-ref): lines of JSON both ways. What an earlier
// client left on the line is passed over: guest-sync-delimited has the agent answer with a byte that is in no JSON, and our number.
//
//   -> ff {"execute":"guest-sync-delimited","arguments":{"id":N}}
//   <- ...whatever... ff {"return":N}
//   -> {"execute":"guest-fsfreeze-freeze"}
//   <- {"return":2}

import { randomInt } from 'node:crypto'
import net from 'node:net'
import { AGENT_REPLY_MAX } from '../base/limits.ts'
import { BlockError, toBlockError } from '../block/error.ts'

/** The byte that begins the answer to a synchronization, and makes the agent forget half a request. */
const SENTINEL = 0xff
const NEWLINE = 0x0a
/** The agent takes 64 bits; these many are exact in JSON. */
const ID_MAX = 2 ** 47

export type AgentCommand = 'guest-fsfreeze-freeze' | 'guest-fsfreeze-thaw' | 'guest-fsfreeze-status'

/** What the agent returned. Kinds 'timeout' when `signal` comes first, 'io' for an error of it, 'protocol', 'not-found' without a socket. */
export async function agentCall(socket: string, command: AgentCommand, signal: AbortSignal): Promise<unknown> {
  const line = new AgentLine(socket, signal)
  try {
    const id = randomInt(ID_MAX)
    await line.send(Buffer.concat([Buffer.of(SENTINEL), request('guest-sync-delimited', { id })]))
    while ((await line.afterSentinel()).return !== id) continue
    await line.send(request(command))
    const { return: returned, error } = await line.answer()
    if (error === undefined) return returned
    throw new BlockError('io', `the guest agent at ${socket} refuses ${command}: ${JSON.stringify(error)}`)
  } finally {
    line.close()
  }
}

interface Answer {
  readonly return?: unknown
  readonly error?: unknown
}

function request(execute: string, args?: object): Buffer {
  return Buffer.from(`${JSON.stringify({ execute, ...(args === undefined ? {} : { arguments: args }) })}\n`)
}

/** A connection, and what came in on it that was not taken yet. */
class AgentLine {
  readonly #name: string
  readonly #socket: net.Socket
  #came = Buffer.alloc(0)
  #failure: BlockError | undefined
  #wake: (() => void) | undefined

  constructor(path: string, signal: AbortSignal) {
    this.#name = path
    this.#socket = net.connect({ path, signal })
    this.#socket.on('data', (data) => {
      this.#came = Buffer.concat([this.#came, data])
      if (this.#came.length > AGENT_REPLY_MAX)
        this.#fail(new BlockError('protocol', `the guest agent at ${path} says too much`))
      this.#wake?.()
    })
    const gone = `the guest agent at ${path} hung up: does QEMU run, and does another program use the socket?`
    this.#socket.on('close', () => this.#fail(new BlockError('io', gone)))
    this.#socket.on('error', (error) =>
      this.#fail(
        signal.aborted
          ? new BlockError('timeout', `the guest agent at ${path} did not answer in time: does it run in the guest?`)
          : toBlockError(error, `the guest agent at ${path}`),
      ),
    )
  }

  async send(data: Buffer): Promise<void> {
    if (this.#failure !== undefined) throw this.#failure
    this.#socket.write(data)
  }

  /** The next answer that begins with the sentinel. */
  async afterSentinel(): Promise<Answer> {
    for (;;) {
      const at = this.#came.indexOf(SENTINEL)
      if (at >= 0) {
        this.#came = this.#came.subarray(at + 1)
        return this.answer()
      }
      this.#came = Buffer.alloc(0)
      await this.#more()
    }
  }

  /** The next line. */
  async answer(): Promise<Answer> {
    for (;;) {
      const end = this.#came.indexOf(NEWLINE)
      if (end >= 0) {
        const text = this.#came.subarray(0, end).toString()
        this.#came = this.#came.subarray(end + 1)
        return this.#parse(text)
      }
      await this.#more()
    }
  }

  close(): void {
    this.#socket.destroy()
  }

  #parse(text: string): Answer {
    try {
      const answer: unknown = JSON.parse(text)
      if (typeof answer === 'object' && answer !== null) return answer
    } catch {
      // Said below.
    }
    throw new BlockError('protocol', `the guest agent at ${this.#name} did not answer in JSON: ${text.slice(0, 100)}`)
  }

  async #more(): Promise<void> {
    if (this.#failure !== undefined) throw this.#failure
    await new Promise<void>((resolve) => (this.#wake = resolve))
  }

  #fail(error: BlockError): void {
    this.#failure ??= error
    this.#wake?.()
  }
}
