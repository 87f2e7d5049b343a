// Thousands of connections that send garbage, stop in the middle, close one side or vanish, to a disk's socket and to the API's.
// The daemon lives, the guest that was there notices nothing, and memory and file descriptors come back.

import assert from 'node:assert/strict'
import fs from 'node:fs'
import http from 'node:http'
import net from 'node:net'
import path from 'node:path'
import { after, before, test } from 'node:test'
import { Random } from '../../src/base/random.ts'
import type { NbdClient } from '../../src/nbd/client.ts'
import { goMessage, optionMessage, requestMessage, u32, u64 } from '../support/nbd-wire.ts'
import { MIB, Site } from '../support/site.ts'

const ROUNDS = 3000
const AT_ONCE = 64
const PATIENCE_MS = 5000
/** What the daemon may grow by after as many connections have warmed it up. */
const GROWTH_BYTES = 64 * MIB

let site: Site
let guest: NbdClient
const random = new Random(11)

before(async () => {
  site = await Site.start()
  await site.disk('vm1', '8M')
  guest = await site.guest('vm1')
})
after(async () => {
  await guest.close()
  await site.end()
})

const HELLO = u32(3)
const ENTER = Buffer.concat([HELLO, goMessage('vm1')])
const noise = (length: number): Buffer => {
  const bytes = Buffer.alloc(length)
  random.fill(bytes)
  return bytes
}

/** What a bad NBD client sends. */
const NBD_GARBAGE: readonly (() => Buffer)[] = [
  () => Buffer.alloc(0),
  () => noise(100),
  () => noise(70_000),
  () => Buffer.from('GET / HTTP/1.1\r\n\r\n'),
  () => u32(0xffff_ffff),
  () => HELLO,
  () => Buffer.concat([HELLO, noise(64)]),
  () => Buffer.concat([HELLO, Buffer.from('IHAVEOPT'), u32(7), u32(0xffff_ffff)]),
  () => Buffer.concat([HELLO, goMessage('another')]),
  () => Buffer.concat([HELLO, optionMessage(99, noise(200))]),
  () => Buffer.concat([HELLO, goMessage('vm1').subarray(0, 10)]),
  () => ENTER,
  () => Buffer.concat([ENTER, noise(64)]),
  () => Buffer.concat([ENTER, requestMessage({ type: 0, length: 4096 }).subarray(0, 20)]),
  () => Buffer.concat([ENTER, requestMessage({ type: 0, offset: 2 ** 52, length: 4096 })]),
  () => Buffer.concat([ENTER, requestMessage({ type: 0, length: 0xffff_ffff })]),
  () => Buffer.concat([ENTER, requestMessage({ type: 1, length: 65_536, data: Buffer.alloc(0) }), noise(1000)]),
  () => Buffer.concat([ENTER, requestMessage({ type: 77 }), u64(0)]),
  () => Buffer.concat([ENTER, ...Array.from({ length: 64 }, () => requestMessage({ type: 0, length: 65_536 }))]),
]

/** What a bad HTTP client sends. */
const HTTP_GARBAGE: readonly (() => Buffer)[] = [
  () => Buffer.alloc(0),
  () => noise(100),
  () => noise(70_000),
  () => Buffer.from('GET'),
  () => Buffer.from('GET /v1/disks HTTP/1.1\r\n'),
  () => Buffer.from(`GET /${'x'.repeat(40_000)} HTTP/1.1\r\nHost: a\r\n\r\n`),
  () => Buffer.from(`GET /v1/disks HTTP/1.1\r\nHost: a\r\nX: ${'y'.repeat(40_000)}\r\n\r\n`),
  () => Buffer.from('POST /v1/disks HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n{"name"'),
  () => Buffer.from('POST /v1/disks HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n'),
  () => Buffer.from('POST /v1/disks HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n'),
  () => Buffer.from('GET /v1/jobs/%ff/events HTTP/1.1\r\nHost: a\r\n\r\n'),
  () => Buffer.from('GET /v1/disks HTTP/1.1\r\nHost: a\r\n\r\n'.repeat(20)),
]

const ENDINGS = ['end', 'destroy', 'wait'] as const

/** Connects, sends, and ends in one of several ways; resolves when the connection is gone. */
function connectBadly(socket: string, bytes: Buffer, ending: (typeof ENDINGS)[number]): Promise<void> {
  return new Promise((resolve) => {
    const connection = net.connect({ path: socket, allowHalfOpen: true })
    const patience = setTimeout(() => connection.destroy(), ending === 'wait' ? 20 : PATIENCE_MS)
    connection.on('error', () => undefined)
    connection.on('close', () => {
      clearTimeout(patience)
      resolve()
    })
    connection.on('data', () => undefined)
    connection.on('end', () => connection.destroy())
    connection.write(bytes, () => {
      if (ending === 'end') connection.end()
      else if (ending === 'destroy') connection.destroy()
    })
  })
}

async function attack(socket: string, garbage: readonly (() => Buffer)[], rounds: number): Promise<void> {
  let left = rounds
  const one = async (): Promise<void> => {
    while (left-- > 0) await connectBadly(socket, random.pick(garbage)(), random.pick(ENDINGS))
  }
  await Promise.all(Array.from({ length: AT_ONCE }, one))
}

interface Usage {
  readonly memory: number
  readonly descriptors: number
}

async function usage(): Promise<Usage> {
  const { pid, memory } = await site.daemon.api.call('showStatus', {}, {})
  return { memory, descriptors: fs.readdirSync(`/proc/${pid}/fd`).length }
}

/** The guest writes and reads during the whole attack; returns how often. */
async function guestDuring(work: Promise<void>): Promise<number> {
  let isOver = false
  const over = work.finally(() => (isOver = true))
  let count = 0
  const block = Buffer.alloc(4096)
  const found = Buffer.alloc(4096)
  while (!isOver) {
    block.fill(count++ % 256)
    await guest.write((count % 100) * 4096, 4096, block, 0, 0)
    await guest.read((count % 100) * 4096, 4096, found, 0)
    assert.ok(found.equals(block))
  }
  await over
  return count
}

for (const { what, socket, garbage } of [
  { what: 'a disk’s NBD socket', socket: path.join('run', 'nbd', 'vm1.sock'), garbage: NBD_GARBAGE },
  { what: 'the API’s socket', socket: path.join('run', 'api.sock'), garbage: HTTP_GARBAGE },
]) {
  test(`garbage on ${what} harms nobody and leaves nothing behind`, async (t) => {
    const target = path.join(site.home, socket)
    await attack(target, garbage, ROUNDS)
    const before = await usage()
    const operations = await guestDuring(attack(target, garbage, ROUNDS))
    assert.ok(operations > 20, `the guest did ${operations} writes only`)
    let now = await usage()
    for (let i = 0; i < 100 && now.descriptors > before.descriptors; i++) {
      await new Promise((resolve) => setTimeout(resolve, 100))
      now = await usage()
    }
    t.diagnostic(`memory ${before.memory / MIB} to ${now.memory / MIB} MiB, ${operations} guest writes`)
    assert.ok(now.descriptors <= before.descriptors, `${before.descriptors} descriptors became ${now.descriptors}`)
    assert.ok(now.memory - before.memory < GROWTH_BYTES, `memory ${before.memory} became ${now.memory}`)
    assert.equal(
      site
        .log()
        .split('\n')
        .filter((line) => /warn|Error|"level":[456]0/i.test(line)).length,
      0,
      site.log(),
    )
    await site.done('disk', 'list')
  })
}

interface BadRequest {
  readonly name: string
  readonly method: string
  readonly path: string
  readonly body?: string
  /** Bytes that the request says will follow, none of which do. */
  readonly announced?: number
  readonly status: number
}

const BAD_REQUESTS: readonly BadRequest[] = [
  { name: 'a path that is not there', method: 'GET', path: '/v1/nothing', status: 404 },
  { name: 'a method that is not there', method: 'PATCH', path: '/v1/disks', status: 404 },
  { name: 'no body', method: 'POST', path: '/v1/disks', status: 400 },
  { name: 'a body that is no JSON', method: 'POST', path: '/v1/disks', body: '{"name":', status: 400 },
  { name: 'a body of another shape', method: 'POST', path: '/v1/disks', body: '[1,2,3]', status: 400 },
  {
    name: 'a format nobody knows',
    method: 'POST',
    path: '/v1/disks',
    body: '{"name":"d","image":"/i","format":"x"}',
    status: 400,
  },
  {
    name: 'a negative size',
    method: 'POST',
    path: '/v1/disks',
    body: '{"name":"d","image":"/i","format":"raw","size":-1}',
    status: 400,
  },
  { name: 'a body too long', method: 'POST', path: '/v1/disks', announced: 2 * MIB, status: 413 },
  { name: 'an unknown verb', method: 'POST', path: '/v1/jobs/j/explode', body: '{}', status: 400 },
  { name: 'events of an unknown job', method: 'GET', path: '/v1/jobs/nope/events', status: 404 },
  { name: 'a name that is no UTF-8', method: 'GET', path: '/v1/disks/%ff', status: 400 },
]

for (const { name, status, ...rest } of BAD_REQUESTS) {
  test(`an API request with ${name} gets status ${status} and an error with a kind and a message`, async () => {
    const answer = await request(rest)
    assert.equal(answer.status, status, answer.text)
    const { error } = JSON.parse(answer.text) as { error: { kind: string; message: string } }
    assert.match(error.kind, /^(invalid-argument|not-found)$/)
    assert.ok(error.message.length > 5)
    assert.doesNotMatch(answer.text, /node_modules|\.ts:/)
  })
}

function request(bad: Omit<BadRequest, 'name' | 'status'>): Promise<{ status: number; text: string }> {
  const { method, path: url, body, announced } = bad
  return new Promise((resolve, reject) => {
    const headers = {
      ...(body === undefined && announced === undefined ? {} : { 'content-type': 'application/json' }),
      ...(announced === undefined ? {} : { 'content-length': announced }),
    }
    const socketPath = path.join(site.home, 'run', 'api.sock')
    const sent = http.request({ socketPath, method, path: url, headers, agent: false }, (response) => {
      let text = ''
      response.on('data', (chunk: Buffer) => (text += chunk.toString()))
      response.on('end', () => {
        resolve({ status: response.statusCode ?? 0, text })
        sent.destroy()
      })
    })
    sent.on('error', reject)
    if (announced === undefined) sent.end(body)
    else sent.flushHeaders()
  })
}
