// NBD through the API's door: a request that upgrades to "nbd" becomes a connection to the socket of a disk that moves to here, or moved,
// or of one in a view, and from then on bytes go both ways as they are. So a migration, and a backup from elsewhere, needs one port, one
// certificate and one token.
//
//   GET /v1/incoming/TOKEN/data         Upgrade: nbd     ->     101, then NBD
//   GET /v1/views/VIEW/DISK/data

import type http from 'node:http'
import net from 'node:net'
import type { Duplex } from 'node:stream'
import { BlockError, toBlockError } from '../block/error.ts'
import type { Door } from './door.ts'
import { HTTP_STATUS } from './status-codes.ts'

/** What is connected to. */
export type Tunneled =
  | { readonly kind: 'incoming'; readonly token: string }
  | { readonly kind: 'view'; readonly view: string; readonly disk: string }

/** Where the upgrade is asked for. */
export function tunnelPath(to: Tunneled): string {
  if (to.kind === 'incoming') return `/v1/incoming/${to.token}/data`
  return `/v1/views/${encodeURIComponent(to.view)}/${encodeURIComponent(to.disk)}/data`
}

/** The socket of it; kinds 'not-found' and 'busy'. */
export type FindSocket = (to: Tunneled, isDistant: boolean) => Promise<string>

/** Returns how to hang up on all that came through. */
export function addTunnel(server: http.Server, door: Door, find: FindSocket): () => void {
  const clients = new Set<Duplex>()
  server.on('upgrade', (request: http.IncomingMessage, client: Duplex, head: Buffer) => {
    client.on('error', () => {})
    clients.add(client)
    client.once('close', () => clients.delete(client))
    open(request, door, find).then(
      (there) => {
        client.write('HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: nbd\r\n\r\n')
        if (head.length > 0) there.write(head)
        join(client, there)
      },
      (error: unknown) => refuse(client, toBlockError(error, 'internal error')),
    )
  })
  return () => {
    for (const client of clients) client.destroy()
  }
}

async function open(request: http.IncomingMessage, door: Door, find: FindSocket): Promise<net.Socket> {
  door.check(request)
  const to = parseTunnel(request.url ?? '')
  if (to === undefined || request.headers.upgrade !== 'nbd')
    throw new BlockError('not-found', `there is no ${request.method} ${request.url} to upgrade`)
  const path = await find(to, door.isDistant(request))
  const there = net.connect(path)
  await new Promise<void>((resolve, reject) => {
    there.once('connect', resolve)
    there.once('error', (error) => reject(toBlockError(error, `${path}: the disk`, { path })))
  })
  return there
}

function parseTunnel(url: string): Tunneled | undefined {
  const [, token] = /^\/v1\/incoming\/([0-9a-f]{32})\/data$/.exec(url) ?? []
  if (token !== undefined) return { kind: 'incoming', token }
  // Names of views and disks need no escape: what has one is none.
  const [, view, disk] = /^\/v1\/views\/([\w.-]{1,64})\/([\w.-]{1,64})\/data$/.exec(url) ?? []
  return view === undefined || disk === undefined ? undefined : { kind: 'view', view, disk }
}

function refuse(client: Duplex, { kind, message }: BlockError): void {
  const body = JSON.stringify({ error: { kind, message } })
  const head = `HTTP/1.1 ${HTTP_STATUS[kind]} Refused\r\nContent-Type: application/json\r\nConnection: close`
  client.end(`${head}\r\nContent-Length: ${Buffer.byteLength(body)}\r\n\r\n${body}`)
}

/** Passes all that one says on to the other, and back; the end of one is the end of both. */
export function join(one: Duplex, other: Duplex): void {
  for (const [from, to] of [
    [one, other],
    [other, one],
  ] as const) {
    from.on('error', () => {})
    from.once('close', () => to.destroy())
    from.pipe(to)
  }
}
