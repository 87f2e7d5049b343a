// Talks to a daemon, over its Unix socket or elsewhere, typed by the table of routes. Errors come back as the BlockErrors that they were.

import type http from 'node:http'
import { BlockError, ERROR_KINDS, type ErrorKind, toBlockError } from '../block/error.ts'
import { REPLY_BYTES_MAX } from '../base/limits.ts'
import {
  type BodyInput,
  errorBody,
  type JobReply,
  jobEventsPath,
  type Params,
  type Reply,
  type RouteName,
  routes,
} from './schema.ts'

// Not by an import: that asks the module for all that it has, WebSockets among it, and every command would start 25 ms later.
const { request: httpRequest } = process.getBuiltinModule('node:http')

/** A daemon elsewhere: how it is called in messages, how it is reached, and what goes with each request. */
export interface DistantDaemon {
  readonly name: string
  readonly agent: http.Agent
  readonly headers: () => http.OutgoingHttpHeaders
}

export class ApiClient {
  readonly #where: string | DistantDaemon

  /** The path of a daemon's socket, or a daemon elsewhere. */
  constructor(where: string | DistantDaemon) {
    this.#where = where
  }

  /**
   * Calls a route. Kind 'not-found' with how to start it when no daemon listens, 'timeout' when it has not answered after `timeoutMs`
   * milliseconds; it has no limit unless told.
   */
  async call<K extends RouteName>(
    name: K,
    params: Params<K>,
    body: BodyInput<K>,
    timeoutMs?: number,
  ): Promise<Reply<K>> {
    const route = routes[name]
    const path = route.path.replace(/:(\w+)/g, (_, key: string) =>
      encodeURIComponent(String((params as Record<string, unknown>)[key])),
    )
    const { status, text } = await this.#request(
      route.method,
      path,
      route.method === 'GET' ? undefined : body,
      timeoutMs,
    )
    const answer = parseJson(text)
    if (status === 200) return route.response.parse(answer) as Reply<K>
    throw errorFrom(answer, status)
  }

  /** Follows a job to its end, or until it `isOver`, telling `progress` of each change; returns its last status. */
  async follow(
    id: string,
    progress: (status: JobReply) => void,
    isOver: (status: JobReply) => boolean = () => false,
  ): Promise<JobReply> {
    const leftBehind = (cause?: unknown): BlockError => {
      const message = `the daemon went away while job ${id} was running; the job goes on when it starts again`
      return new BlockError('io', message, {}, cause)
    }
    // The job was told of by a daemon: when none answers, it went away since.
    const response = await this.#open('GET', jobEventsPath(id), undefined).catch((error: unknown) => {
      throw leftBehind(error)
    })
    if (response.statusCode !== 200) throw errorFrom(parseJson(await readText(response)), response.statusCode ?? 0)
    let last: JobReply | undefined
    let rest = ''
    response.setEncoding('utf8')
    try {
      for await (const chunk of response) {
        const events = (rest + String(chunk)).split('\n\n')
        rest = events.pop() ?? ''
        for (const event of events) {
          last = routes.showJob.response.parse(JSON.parse(event.slice('data: '.length)))
          progress(last)
          if (isOver(last)) return last
        }
      }
    } catch {
      // Falls through: a cut stream is told by the missing end.
    }
    if (last?.endedMs !== undefined) return last
    throw leftBehind()
  }

  async #request(
    method: string,
    path: string,
    body: unknown,
    timeoutMs: number | undefined,
  ): Promise<{ status: number; text: string }> {
    if (timeoutMs === undefined) {
      const response = await this.#open(method, path, body)
      return { status: response.statusCode ?? 0, text: await readText(response) }
    }
    const signal = AbortSignal.timeout(timeoutMs)
    try {
      const response = await this.#open(method, path, body, signal)
      return { status: response.statusCode ?? 0, text: await readText(response) }
    } catch (error) {
      if (!signal.aborted) throw toBlockError(error, `the daemon at ${this.#name}`)
      throw new BlockError('timeout', `the daemon at ${this.#name} has not answered for ${timeoutMs / 1000} s`)
    }
  }

  get #name(): string {
    return typeof this.#where === 'string' ? this.#where : this.#where.name
  }

  #open(method: string, path: string, body: unknown, signal?: AbortSignal): Promise<http.IncomingMessage> {
    const payload = body === undefined ? undefined : JSON.stringify(body)
    const content =
      payload === undefined ? {} : { 'content-type': 'application/json', 'content-length': Buffer.byteLength(payload) }
    const where = this.#where
    const reach =
      typeof where === 'string'
        ? { socketPath: where, agent: false, headers: content }
        : { agent: where.agent, headers: { ...where.headers(), ...content } }
    return new Promise((resolve, reject) => {
      const request = httpRequest({ ...reach, method, path, ...(signal === undefined ? {} : { signal }) }, resolve)
      request.on('error', (error: NodeJS.ErrnoException) => {
        // The other side closed a connection that was kept, which says nothing of it: what is asked of a daemon elsewhere may be asked twice.
        const isStale = request.reusedSocket && error.code === 'ECONNRESET' && typeof where !== 'string'
        if (isStale) resolve(this.#open(method, path, body, signal))
        else reject(this.#unreachable(error))
      })
      request.end(payload)
    })
  }

  #unreachable(error: NodeJS.ErrnoException): BlockError {
    if (error instanceof BlockError) return error
    const isAbsent = error.code === 'ENOENT' || error.code === 'ECONNREFUSED'
    if (typeof this.#where !== 'string') {
      const remedy = isAbsent ? ': does it run, with --api-port where it is reached by TCP?' : ''
      return new BlockError('io', `the daemon at ${this.#name} cannot be reached: ${error.message}${remedy}`, {}, error)
    }
    if (isAbsent) {
      const message = `no daemon listens at ${this.#where}: start one with varve serve, or name its home with --home`
      return new BlockError('not-found', message, { path: this.#where }, error)
    }
    return new BlockError('io', `the daemon at ${this.#where}: ${error.message}`, { path: this.#where }, error)
  }
}

export async function readText(response: http.IncomingMessage): Promise<string> {
  const chunks: Buffer[] = []
  let length = 0
  for await (const chunk of response) {
    length += (chunk as Buffer).length
    if (length > REPLY_BYTES_MAX) throw new BlockError('protocol', 'the daemon sent an answer that is too long')
    chunks.push(chunk as Buffer)
  }
  return Buffer.concat(chunks).toString('utf8')
}

export function parseJson(text: string): unknown {
  try {
    return JSON.parse(text)
  } catch {
    throw new BlockError('protocol', `the daemon did not answer in JSON: ${text.slice(0, 200)}`)
  }
}

export function errorFrom(answer: unknown, status: number): BlockError {
  const parsed = errorBody.safeParse(answer)
  if (!parsed.success) return new BlockError('protocol', `the daemon answered with status ${status}`)
  const { kind, message } = parsed.data.error
  return new BlockError((ERROR_KINDS as readonly string[]).includes(kind) ? (kind as ErrorKind) : 'io', message)
}
