// What clients can do to each other and to the server's memory with real sockets: stall at every point, ask without reading, come
// and go by the thousand, ask for ten thousand things at once. The others are served, and the memory comes back.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import v8 from 'node:v8'
import vm from 'node:vm'
import { RawPeer, serveDevice } from '../../test/support/nbd.ts'
import { enter, goMessage, optionMessage, requestMessage, simpleReply, u32 } from '../../test/support/nbd-wire.ts'
import { NBD_CONNECTION_BYTES, NBD_HANDSHAKE_MS, NBD_RECEIVE_BUFFER, NBD_REPLY_BUFFER } from '../base/limits.ts'
import type { Pending } from '../block/device.ts'
import { Filter } from '../block/filter.ts'
import { MemoryDevice } from '../block/memory.ts'
import type { NbdServer } from './server.ts'
import { sharedBuffersInUse } from './shared-buffer.ts'

const MIB = 1024 * 1024

async function allGone(server: NbdServer): Promise<void> {
  while (server.connections > 0) await new Promise((resolve) => setTimeout(resolve, 2))
}

/** Bytes of the heap and of buffers that are in use, after what is garbage was collected. */
async function memoryInUse(): Promise<{ readonly heap: number; readonly buffers: number }> {
  v8.setFlagsFromString('--expose-gc')
  const collect = vm.runInNewContext('gc') as () => void
  for (let i = 0; i < 3; i++) {
    collect()
    await new Promise((resolve) => setTimeout(resolve, 5))
  }
  const { heapUsed, arrayBuffers } = process.memoryUsage()
  return { heap: heapUsed, buffers: arrayBuffers }
}

test('clients that stall anywhere cost a bounded number of buffers, and the others are served', async (t) => {
  const { server, target } = await serveDevice(t, new MemoryDevice(4 * MIB))
  const hello = Buffer.concat([u32(3), goMessage('')])
  const stalls = [
    Buffer.alloc(0),
    hello.subarray(0, 3),
    hello.subarray(0, 15),
    Buffer.concat([u32(3), optionMessage(7, Buffer.alloc(10_000)).subarray(0, 9000)]),
    Buffer.concat([hello, requestMessage({ type: 0, length: 4096 }).subarray(0, 27)]),
    Buffer.concat([hello, requestMessage({ type: 1, data: Buffer.alloc(60_000) }).subarray(0, 30_000)]),
    Buffer.concat([hello, requestMessage({ type: 1, data: Buffer.alloc(MIB) }).subarray(0, 500_000)]),
  ]
  const peers = Array.from({ length: 140 }, (_, i) => {
    const peer = new RawPeer(target)
    peer.send(stalls[i % stalls.length] as Buffer)
    return peer
  })
  while (server.connections < peers.length) await new Promise((resolve) => setTimeout(resolve, 2))
  const busy = new RawPeer(target)
  await enter(busy)
  for (let i = 0; i < 20; i++) {
    busy.send(requestMessage({ type: 0, length: 4096 }))
    assert.equal(await simpleReply(busy), 0)
    await busy.receive(4096)
  }
  // Each has a buffer to receive in, one to reply from, and perhaps one for a long write.
  assert.ok(sharedBuffersInUse() <= 3 * (peers.length + 1), `${sharedBuffersInUse()} buffers`)
  for (const peer of [...peers, busy]) peer.socket.destroy()
  await allGone(server)
  assert.equal(sharedBuffersInUse(), 0)
})

test('a client that drips its handshake byte by byte gets no more time than any other', async (t) => {
  t.mock.timers.enable({ apis: ['setTimeout'] })
  const { target } = await serveDevice(t, new MemoryDevice(MIB))
  const peer = new RawPeer(target)
  await peer.receive(18)
  const bytes = Buffer.concat([u32(3), goMessage('a name that takes its time')])
  const step = NBD_HANDSHAKE_MS / 30
  for (let i = 0; i < 30; i++) {
    assert.equal(peer.isEnded, false)
    peer.send(bytes.subarray(i, i + 1))
    await new Promise((resolve) => setImmediate(resolve))
    t.mock.timers.tick(step)
  }
  assert.equal((await peer.rest()).length, 0)
})

test('a thousand clients come, work a little and drop, and the memory is back at the start', async (t) => {
  const { server, target } = await serveDevice(t, new MemoryDevice(4 * MIB))
  const wave = async (count: number): Promise<void> => {
    const peers = Array.from({ length: count }, () => new RawPeer(target))
    await Promise.all(
      peers.map(async (peer, i) => {
        if (i % 4 === 0) return
        await enter(peer)
        peer.send(requestMessage({ type: 1, offset: i * 4096, data: Buffer.alloc(4096) }))
        if (i % 4 === 1) return
        assert.equal(await simpleReply(peer), 0)
        peer.send(requestMessage({ type: 0, length: MIB }))
      }),
    )
    for (const peer of peers) peer.socket.destroy()
    await allGone(server)
  }
  for (let i = 0; i < 2; i++) await wave(50)
  const before = await memoryInUse()
  for (let i = 0; i < 20; i++) await wave(50)
  const after = await memoryInUse()
  assert.equal(sharedBuffersInUse(), 0)
  const grown = { heap: after.heap - before.heap, buffers: after.buffers - before.buffers }
  t.diagnostic(`heap ${grown.heap} bytes, buffers ${grown.buffers} bytes`)
  assert.ok(grown.heap < 2 * MIB, `the heap grew by ${grown.heap} bytes`)
  // The pool keeps free buffers of each size that was ever needed, up to its bound.
  assert.ok(grown.buffers < 8 * MIB, `buffers grew by ${grown.buffers} bytes`)
})

test('clients that ask and never read cost the bound of a connection each, and the others are served', async (t) => {
  const { server, target } = await serveDevice(t, new MemoryDevice(4 * MIB))
  const before = process.memoryUsage().arrayBuffers
  const count = 4
  const peers: RawPeer[] = []
  for (let i = 0; i < count; i++) {
    const peer = new RawPeer(target)
    await enter(peer)
    peer.socket.pause()
    for (let k = 0; k < 500; k++) peer.send(requestMessage({ type: 0, length: MIB }))
    peers.push(peer)
  }
  const busy = new RawPeer(target)
  await enter(busy)
  for (let i = 0; i < 50; i++) {
    busy.send(requestMessage({ type: 0, length: 4096 }))
    assert.equal(await simpleReply(busy), 0)
    await busy.receive(4096)
  }
  // A buffer of a MiB and a header comes from the pool as one of two.
  const bound = (count + 1) * (NBD_RECEIVE_BUFFER + NBD_REPLY_BUFFER + 2 * NBD_CONNECTION_BYTES + 2 * MIB)
  assert.ok(process.memoryUsage().arrayBuffers - before < bound + 16 * MIB)
  for (const peer of [...peers, busy]) peer.socket.destroy()
  await allGone(server)
  assert.equal(sharedBuffersInUse(), 0)
})

test('a request is answered in time though another client asked for ten thousand things at once', async (t) => {
  const count = 10_000
  let served = 0
  let sentAt = 0
  let answeredAt = 0
  let ask: () => void = () => {}
  class Watched extends Filter {
    override read(offset: number, length: number, into: Uint8Array, at: number): Pending {
      if (offset === MIB) answeredAt = served
      else if (++served === 500) ask()
      return super.read(offset, length, into, at)
    }
  }
  const { target } = await serveDevice(t, new Watched(new MemoryDevice(2 * MIB)))
  const [greedy, modest] = [new RawPeer(target), new RawPeer(target)]
  for (const peer of [greedy, modest]) {
    t.after(() => peer.socket.destroy())
    await enter(peer)
  }
  greedy.socket.removeAllListeners('data')
  greedy.socket.resume()
  ask = () => {
    sentAt = served
    modest.send(requestMessage({ type: 0, offset: MIB, length: 512 }))
  }
  greedy.send(...Array.from({ length: count }, (_, i) => requestMessage({ type: 0, cookie: i, length: 1024 })))
  assert.equal(await simpleReply(modest), 0)
  t.diagnostic(`${answeredAt - sentAt} requests of the other client in between`)
  assert.ok(answeredAt - sentAt < count / 2, `${answeredAt - sentAt} requests came first`)
  while (served < count) await new Promise((resolve) => setTimeout(resolve, 2))
})
