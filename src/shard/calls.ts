// Calls between threads: a table of named functions on each side of a port. Arguments and results are plain data, errors cross
// with their kind. A side that is gone fails every call that waits for it. Knows nothing of what is called.
//
//   { call: 7, name: 'addDisk', args: [...] }   ->
//                                               <-   { answer: 7, result } or { answer: 7, error: { kind, message, place } }

import { BlockError, type ErrorKind, type Place, toBlockError } from '../block/error.ts'

/** What both a Worker and a worker's parentPort are. */
export interface Port {
  postMessage(message: unknown, transfer?: readonly ArrayBuffer[]): void
  on(event: 'message', listener: (message: unknown) => void): unknown
}

/** The functions of one side. Each may be called from the other; what they return is awaited. */
export type Functions = Readonly<Record<string, (...args: never[]) => unknown>>

/** The functions of type F as the other side sees them: all of them promise their answer. */
export type Remote<F extends Functions> = {
  readonly [K in keyof F]: (...args: Parameters<F[K]>) => Promise<Awaited<ReturnType<F[K]>>>
}

interface PlainError {
  readonly kind: ErrorKind
  readonly message: string
  readonly place: Place
}

interface Waiting {
  readonly resolve: (result: unknown) => void
  readonly reject: (error: BlockError) => void
}

interface Call {
  readonly call: number
  readonly name: string
  readonly args: readonly unknown[]
}

interface Answer {
  readonly answer: number
  readonly result?: unknown
  readonly error?: PlainError
}

export class Calls<Theirs extends Functions> {
  /** The other side's functions. */
  readonly remote: Remote<Theirs>
  readonly #port: Port
  readonly #waiting = new Map<number, Waiting>()
  #last = 0
  #lost: BlockError | undefined

  /** `ours` is what the other side may call. `report` hears of faults in ours: errors that are no BlockErrors. */
  constructor(port: Port, ours: Functions, report: (error: unknown) => void) {
    this.#port = port
    this.remote = new Proxy({} as Remote<Theirs>, {
      get: (_target, name) =>
        // Not a promise, though it answers to any name.
        name === 'then' ? undefined : (...args: unknown[]) => this.#call(String(name), args),
    })
    port.on('message', (message) => {
      if ('call' in (message as Call | Answer)) void this.#serve(message as Call, ours, report)
      else this.#settle(message as Answer)
    })
  }

  /** The other side is gone: every call fails with this, now and later. */
  lose(error: BlockError): void {
    this.#lost ??= error
    for (const { reject } of this.#waiting.values()) reject(error)
    this.#waiting.clear()
  }

  #call(name: string, args: readonly unknown[]): Promise<unknown> {
    return new Promise((resolve, reject) => {
      if (this.#lost !== undefined) return reject(this.#lost)
      const call = ++this.#last
      this.#waiting.set(call, { resolve, reject })
      this.#port.postMessage({ call, name, args } satisfies Call)
    })
  }

  async #serve({ call, name, args }: Call, ours: Functions, report: (error: unknown) => void): Promise<void> {
    try {
      const found = ours[name] as ((...given: unknown[]) => unknown) | undefined
      if (found === undefined) throw new BlockError('unsupported', `the other thread does not know the call ${name}`)
      const result = await found(...args)
      this.#port.postMessage({ answer: call, result } satisfies Answer)
    } catch (error) {
      if (!(error instanceof BlockError)) report(error)
      const { kind, message, place } = toBlockError(error, name)
      this.#port.postMessage({ answer: call, error: { kind, message, place } } satisfies Answer)
    }
  }

  #settle({ answer, result, error }: Answer): void {
    const waiting = this.#waiting.get(answer)
    this.#waiting.delete(answer)
    if (error === undefined) waiting?.resolve(result)
    else waiting?.reject(new BlockError(error.kind, error.message, error.place))
  }
}
