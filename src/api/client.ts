// Talks to a daemon over its Unix socket, typed by the table of routes. Errors come back as the BlockErrors that they were.

import http from 'node:http'
import { BlockError, ERROR_KINDS, type ErrorKind } from '../block/error.ts'
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

export class ApiClient {
  readonly #socket: string

  constructor(socket: string) {
    this.#socket = socket
  }

  /** Calls a route. Kind 'not-found' with how to start it when no daemon listens. */
  async call<K extends RouteName>(name: K, params: Params<K>, body: BodyInput<K>): Promise<Reply<K>> {
    const route = routes[name]
    const path = route.path.replace(/:(\w+)/g, (_, key: string) =>
      encodeURIComponent(String((params as Record<string, unknown>)[key])),
    )
    const { status, text } = await this.#request(route.method, path, route.method === 'GET' ? undefined : body)
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

  async #request(method: string, path: string, body: unknown): Promise<{ status: number; text: string }> {
    const response = await this.#open(method, path, body)
    return { status: response.statusCode ?? 0, text: await readText(response) }
  }

  #open(method: string, path: string, body: unknown): Promise<http.IncomingMessage> {
    const payload = body === undefined ? undefined : JSON.stringify(body)
    const headers =
      payload === undefined ? {} : { 'content-type': 'application/json', 'content-length': Buffer.byteLength(payload) }
    return new Promise((resolve, reject) => {
      const request = http.request({ socketPath: this.#socket, method, path, headers, agent: false }, resolve)
      request.on('error', (error: NodeJS.ErrnoException) => reject(this.#unreachable(error)))
      request.end(payload)
    })
  }

  #unreachable(error: NodeJS.ErrnoException): BlockError {
    const isAbsent = error.code === 'ENOENT' || error.code === 'ECONNREFUSED'
    if (isAbsent) {
      const message = `no daemon listens at ${this.#socket}: start one with varve serve, or name its home with --home`
      return new BlockError('not-found', message, { path: this.#socket }, error)
    }
    return new BlockError('io', `the daemon at ${this.#socket}: ${error.message}`, { path: this.#socket }, error)
  }
}

async function readText(response: http.IncomingMessage): Promise<string> {
  const chunks: Buffer[] = []
  let length = 0
  for await (const chunk of response) {
    length += (chunk as Buffer).length
    if (length > REPLY_BYTES_MAX) throw new BlockError('protocol', 'the daemon sent an answer that is too long')
    chunks.push(chunk as Buffer)
  }
  return Buffer.concat(chunks).toString('utf8')
}

function parseJson(text: string): unknown {
  try {
    return JSON.parse(text)
  } catch {
    throw new BlockError('protocol', `the daemon did not answer in JSON: ${text.slice(0, 200)}`)
  }
}

function errorFrom(answer: unknown, status: number): BlockError {
  const parsed = errorBody.safeParse(answer)
  if (!parsed.success) return new BlockError('protocol', `the daemon answered with status ${status}`)
  const { kind, message } = parsed.data.error
  return new BlockError((ERROR_KINDS as readonly string[]).includes(kind) ? (kind as ErrorKind) : 'io', message)
}
