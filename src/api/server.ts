// Serves the table of routes over HTTP, with its OpenAPI document at /v1/openapi.json. Translates between
// requests and the engine, nothing more.

import Swagger from '@fastify/swagger'
import fastify, { type FastifyInstance, type FastifyReply } from 'fastify'
import {
  hasZodFastifySchemaValidationErrors,
  jsonSchemaTransform,
  serializerCompiler,
  validatorCompiler,
} from 'fastify-type-provider-zod'
import { BODY_BYTES_MAX, EVENTS_EVERY_MS } from '../base/limits.ts'
import { BlockError, type ErrorKind, toBlockError } from '../block/error.ts'
import type { IncomingStep } from '../engine/peers.ts'
import type { EngineService } from '../engine/service.ts'
import { Door } from './door.ts'
import { type Handlers, hostHandlersOf } from './host-handlers.ts'
import { errorBody, type Reply, type RouteName, routes } from './schema.ts'
import { NAME_LENGTH_MAX, type Route } from './shapes.ts'
import { HTTP_STATUS } from './status-codes.ts'
import { addTunnel, type FindSocket } from './tunnel.ts'

export interface ServerOptions {
  readonly engine: EngineService
  readonly version: string
  readonly home: string
  /** Where requests from the network come in. */
  readonly door?: Door
  /** The socket for another daemon's token. */
  readonly findSocket?: FindSocket
}

function handlersOf({ engine, version, home }: ServerOptions): Handlers {
  return {
    ...hostHandlersOf(engine),
    showStatus: () => {
      return { version, pid: process.pid, home, node: process.version, memory: process.memoryUsage.rss() }
    },
    listDisks: async () => (await engine.listDisks()) as Reply<'listDisks'>,
    addDisk: (_params, { name, image, format, size, cache, durability }) => {
      const added =
        size === undefined
          ? engine.addDisk(name, image, format, cache, durability)
          : engine.createDisk(name, image, format, size, cache, durability)
      return added as Promise<Reply<'addDisk'>>
    },
    showDisk: async ({ disk }) => (await engine.showDisk(disk)) as Reply<'showDisk'>,
    resizeDisk: ({ disk }, { size }) => engine.resizeDisk(disk, size) as Promise<Reply<'resizeDisk'>>,
    editBitmaps: ({ disk }, { edits }) => engine.editBitmaps(disk, edits) as Promise<Reply<'editBitmaps'>>,
    saveBitmaps: ({ disk }, { bitmap }) => engine.saveBitmaps(disk, bitmap) as Promise<Reply<'saveBitmaps'>>,
    compareBitmaps: async ({ disk, first, second }) => engine.compareBitmaps(disk, first, second),
    removeDisk: async ({ disk }) => {
      await engine.removeDisk(disk)
      return {}
    },
    releaseDisk: async ({ disk }) => {
      await engine.releaseDisk(disk)
      return {}
    },
    listSnapshots: ({ disk }) => engine.listSnapshots(disk),
    createSnapshot: ({ disk }, { name }) => engine.createSnapshot(disk, name),
    createSnapshots: (_params, { disks, name }) => engine.createSnapshots(disks, name),
    revert: async ({ disk, snapshot }, { keep }) => {
      await engine.revert(disk, snapshot, keep)
      return {}
    },
    exportSnapshot: async ({ disk, snapshot }) => ({ uri: await engine.exportSnapshot(disk, snapshot) }),
    unexportSnapshot: async ({ disk, snapshot }) => {
      await engine.unexportSnapshot(disk, snapshot)
      return {}
    },
    clone: ({ disk, snapshot }, { name, image }) =>
      engine.clone(disk, snapshot, name, image) as Promise<Reply<'clone'>>,
    deleteSnapshot: ({ disk, snapshot }, { direction, ...terms }) =>
      engine.deleteSnapshot(disk, snapshot, direction, terms) as Promise<Reply<'deleteSnapshot'>>,
    planCommit: async ({ disk }, { from, to }) => ({ ends: [...(await engine.planCommit(disk, from, to))] }),
    commit: ({ disk }, { from, to, ...terms }) => engine.commit(disk, from, to, terms) as Promise<Reply<'commit'>>,
    planStream: async ({ disk }, { base, to }) => ({ ends: [...(await engine.planStream(disk, base, to))] }),
    stream: ({ disk }, { base, to, ...terms }) => engine.stream(disk, base, to, terms) as Promise<Reply<'stream'>>,
    mirror: ({ disk }, request) => engine.mirror(disk, request) as Promise<Reply<'mirror'>>,
    migrate: ({ disk }, request) => engine.migrate(disk, request) as Promise<Reply<'migrate'>>,
    settleDisk: ({ disk }, { force }) => engine.settleDisk(disk, force) as Promise<Reply<'settleDisk'>>,
    prepareIncoming: (_params, request) => engine.prepareIncoming(request) as Promise<Reply<'prepareIncoming'>>,
    stepIncoming: ({ token }, step) =>
      engine.stepIncoming(token, step as IncomingStep) as Promise<Reply<'stepIncoming'>>,
    completeJob: ({ job }, body) => engine.completeJob(job, body.finish) as Promise<Reply<'completeJob'>>,
    setMirrorMode: ({ job }, { mode }) => engine.setMirrorMode(job, mode) as Promise<Reply<'setMirrorMode'>>,
    backup: (_params, request) => engine.backup(request) as Promise<Reply<'backup'>>,
    restore: (_params, request) => engine.restore(request) as Promise<Reply<'restore'>>,
    restoreOnto: ({ disk }, request) => engine.restoreOnto(disk, request) as Promise<Reply<'restoreOnto'>>,
    openView: (_params, request) => engine.openView(request) as Promise<Reply<'openView'>>,
    stepView: ({ view }, step) => engine.stepView(view, step).then(() => ({})),
    listJobs: async () => (await engine.listJobs()) as Reply<'listJobs'>,
    showJob: async ({ job }) => (await engine.showJob(job)) as Reply<'showJob'>,
    sayToJob: ({ job, verb }) => engine.sayToJob(job, verb) as Promise<Reply<'sayToJob'>>,
    dismissJob: async ({ job }) => {
      await engine.dismissJob(job)
      return {}
    },
    setJobSpeed: ({ job }, { speed }) => engine.setJobSpeed(job, speed) as Promise<Reply<'setJobSpeed'>>,
  }
}

/** The HTTP server, not yet listening. */
export async function makeServer(options: ServerOptions): Promise<FastifyInstance> {
  const server = fastify({
    bodyLimit: BODY_BYTES_MAX,
    forceCloseConnections: true,
    routerOptions: { maxParamLength: NAME_LENGTH_MAX },
    // What the router refuses by itself, such as a path that is no UTF-8.
    frameworkErrors: (error, _request, reply) => void sendError(error, reply),
  })
  server.setValidatorCompiler(validatorCompiler)
  server.setSerializerCompiler(serializerCompiler)
  server.setErrorHandler((error, _request, reply) => sendError(error, reply))
  server.setNotFoundHandler((request, reply) =>
    reply.status(404).send({ error: { kind: 'not-found', message: `there is no ${request.method} ${request.url}` } }),
  )
  await server.register(Swagger, {
    openapi: { info: { title: 'Varve', version: options.version } },
    transform: jsonSchemaTransform,
  })
  const { door = new Door(), findSocket } = options
  server.addHook('onRequest', async (request) => door.check(request.raw))
  const hangUp = findSocket === undefined ? undefined : addTunnel(server.server, door, findSocket)
  // Else the server would wait for them.
  server.addHook('preClose', async () => hangUp?.())
  const handlers = handlersOf(options)
  for (const name of Object.keys(routes) as RouteName[]) addRoute(server, name, handlers, door)
  addJobEvents(server, options.engine)
  server.get('/v1/openapi.json', { schema: { hide: true } }, () => server.swagger())
  return server
}

function addRoute(server: FastifyInstance, name: RouteName, handlers: Handlers, door: Door): void {
  const route: Route = routes[name]
  const handler = handlers[name] as (params: unknown, body: unknown) => unknown
  server.route({
    method: route.method,
    url: route.path,
    schema: {
      operationId: name,
      summary: route.summary,
      params: route.params,
      ...(route.method === 'GET' ? {} : { body: route.body }),
      response: { 200: route.response, '4xx': errorBody, '5xx': errorBody },
    },
    handler: async (request) => {
      if (route.local === true && door.isDistant(request.raw))
        throw new BlockError('permission', `${route.method} ${route.path} is for this host alone: ask on its socket`)
      return handler(request.params, request.body)
    },
  })
}

/** Progress comes as often as the job reports it, at most once in EVENTS_EVERY_MS, and once more at the end. */
function addJobEvents(server: FastifyInstance, engine: EngineService): void {
  server.get('/v1/jobs/:job/events', { schema: { hide: true } }, async (request, reply) => {
    const { job } = request.params as { job: string }
    const { raw } = reply
    let timer: NodeJS.Timeout | undefined
    let isBegun = false
    const send = (status: unknown): void => void raw.write(`data: ${JSON.stringify(status)}\n\n`)
    // What is so by then is sent when its time has come: a job that pauses may be silent from then on.
    const sendLater = (): void => {
      timer ??= setTimeout(() => {
        timer = undefined
        if (!isBegun || raw.writableNeedDrain) return sendLater()
        void sendNow().catch(() => undefined)
      }, EVENTS_EVERY_MS)
    }
    const sendNow = async (): Promise<void> => {
      const status = await engine.showJob(job)
      if (!raw.writableEnded && !raw.destroyed) send(status)
    }
    // Watched before it is looked at: a change in between would be missed.
    const unwatch = await engine.watchJob(job, sendLater)
    const stop = (): void => {
      unwatch()
      clearTimeout(timer)
    }
    raw.on('close', stop)
    try {
      const first = await engine.showJob(job)
      reply.hijack()
      raw.writeHead(200, { 'content-type': 'text/event-stream', 'cache-control': 'no-store' })
      send(first)
      isBegun = true
    } catch (error) {
      stop()
      throw error
    }
    void engine.jobEnded(job).then((status) => {
      stop()
      if (raw.writableEnded) return
      send(status)
      raw.end()
    })
  })
}

function sendError(error: unknown, reply: FastifyReply): FastifyReply {
  if (hasZodFastifySchemaValidationErrors(error)) {
    const message = error.validation
      .map((issue) => `${issue.instancePath || 'request'}: ${issue.message ?? ''}`)
      .join('; ')
    return reply.status(400).send({ error: { kind: 'invalid-argument' satisfies ErrorKind, message } })
  }
  const status = (error as { statusCode?: number }).statusCode
  if (status !== undefined && status >= 400 && status < 500) {
    return reply.status(status).send({ error: { kind: 'invalid-argument', message: (error as Error).message } })
  }
  const { kind, message } = toBlockError(error, 'internal error')
  return reply.status(HTTP_STATUS[kind]).send({ error: { kind, message } })
}
