// TLS between our server and our client, and what is refused, before and after it begins ("TLS support").

import assert from 'node:assert/strict'
import fs from 'node:fs'
import path from 'node:path'
import tls from 'node:tls'
import { type TestContext, suite, test } from 'node:test'
import { RawPeer, type Served, serveDevice } from '../../test/support/nbd.ts'
import { ACK, ask, goMessage, greet, optionMessage, u32 } from '../../test/support/nbd-wire.ts'
import { missing } from '../../test/support/peer.ts'
import { makeCredentials } from '../../test/support/tls.ts'
import { Random } from '../base/random.ts'
import { isBlockError } from '../block/error.ts'
import { Filter } from '../block/filter.ts'
import { MemoryDevice } from '../block/memory.ts'
import { connectNbd } from './client.ts'
import {
  NBD_OPT_ABORT,
  NBD_OPT_STARTTLS,
  NBD_REP_ERR_INVALID,
  NBD_REP_ERR_SHUTDOWN,
  NBD_REP_ERR_TLS_REQD,
  NBD_REP_ERR_UNSUP,
} from './spec.ts'
import { type ClientTlsOptions, loadClientTls, loadServerTls, type ServerTls } from './tls.ts'

const SIZE = 1024 * 1024

async function serve(t: TestContext, tls: ServerTls, place: 'unix' | 'tcp' = 'unix'): Promise<Served> {
  return serveDevice(t, new MemoryDevice(SIZE), { place, tls })
}

function fails(kind: 'permission' | 'protocol' | 'not-found' | 'invalid-format' | 'io', words = '') {
  return (error: unknown): boolean => isBlockError(error, kind) && error.message.includes(words)
}

/** The types of the whole option replies in what a server said. */
function repliesIn(said: Buffer): number[] {
  const types: number[] = []
  for (let at = 0; at + 20 <= said.length; at += 20 + said.readUInt32BE(at + 16)) types.push(said.readUInt32BE(at + 12))
  return types
}

suite('TLS', { skip: missing('openssl') }, () => {
  test('data written over TLS reads back, with certificates and with keys, on Unix and TCP', async (t) => {
    const { folder, keysFile } = makeCredentials(t)
    const x509 = { kind: 'x509', folder } as const
    const psk = { kind: 'psk', file: keysFile } as const
    const ways: [ServerTls, ClientTlsOptions][] = [
      [await loadServerTls({ files: x509 }), { files: x509 }],
      [await loadServerTls({ files: x509, verifyPeer: true }), { files: x509 }],
      [await loadServerTls({ files: x509, allowedSubjects: ['CN=client1,O=Varve'] }), { files: x509 }],
      [await loadServerTls({ files: psk }), { files: psk, username: 'bob' }],
    ]
    for (const [server, tls] of ways) {
      for (const place of ['unix', 'tcp'] as const) {
        const { target } = await serve(t, server, place)
        const client = await connectNbd({ ...target, tls })
        const bytes = new Random(1).fill(Buffer.alloc(700_001))
        await Promise.all([client.write(5, 300_000, bytes, 0, 0), client.write(300_005, 400_001, bytes, 300_000, 0)])
        await client.flush()
        const back = Buffer.alloc(bytes.length)
        await client.read(5, back.length, back, 0)
        assert.ok(back.equals(bytes))
        await client.close()
      }
    }
  })

  test('a client that does not prove itself is refused', async (t) => {
    const { folder, strangerFolder, keysFile } = makeCredentials(t)
    const strangers: ClientTlsOptions = { files: { kind: 'x509', folder: strangerFolder } }
    const known: ClientTlsOptions = { files: { kind: 'x509', folder } }
    const psk = await loadServerTls({ files: { kind: 'psk', file: keysFile } })
    const wrongKeys = path.join(folder, 'wrong.psk')
    fs.writeFileSync(wrongKeys, `alice:${'00'.repeat(32)}\ncarol:${'11'.repeat(32)}\n`)
    const verifying = await loadServerTls({ files: { kind: 'x509', folder }, verifyPeer: true })
    const others = await loadServerTls({ files: { kind: 'x509', folder }, allowedSubjects: ['CN=client9,O=Varve'] })
    const cases: [ServerTls, ClientTlsOptions][] = [
      [verifying, strangers],
      [others, known],
      [psk, { files: { kind: 'psk', file: wrongKeys }, username: 'alice' }],
      [psk, { files: { kind: 'psk', file: wrongKeys }, username: 'carol' }],
      [psk, known],
    ]
    for (const [server, tls] of cases) {
      const { target } = await serve(t, server)
      await assert.rejects(connectNbd({ ...target, tls }), (error) => isBlockError(error))
    }
  })

  test('a server that is not who the client looks for is refused', async (t) => {
    const { folder, strangerFolder } = makeCredentials(t)
    const { target } = await serve(t, await loadServerTls({ files: { kind: 'x509', folder: strangerFolder } }), 'tcp')
    const files = { kind: 'x509', folder } as const
    await assert.rejects(connectNbd({ ...target, tls: { files } }), fails('permission'))
    const good = await serve(t, await loadServerTls({ files }), 'tcp')
    await assert.rejects(connectNbd({ ...good.target, tls: { files, hostname: 'other.example' } }), fails('permission'))
    await assert.rejects(connectNbd({ ...good.target, tls: {} }), fails('permission'))
  })

  test('a client that asks for TLS where there is none gets no plain connection', async (t) => {
    const { folder } = makeCredentials(t)
    const { target } = await serveDevice(t, new MemoryDevice(SIZE))
    await assert.rejects(connectNbd({ ...target, tls: { files: { kind: 'x509', folder } } }))
  })

  test('before TLS, all but STARTTLS and ABORT is answered with ERR_TLS_REQD, and EXPORT_NAME ends the connection', async (t) => {
    const { keysFile } = makeCredentials(t)
    const { target } = await serve(t, await loadServerTls({ files: { kind: 'psk', file: keysFile } }))
    await assert.rejects(connectNbd(target), fails('permission', 'nbds:'))
    const peer = new RawPeer(target)
    t.after(() => peer.socket.destroy())
    await greet(peer)
    for (const option of [3, 6, 7, 8, 9, 10, 99]) {
      const [reply] = await ask(peer, optionMessage(option))
      assert.equal(reply?.type, NBD_REP_ERR_TLS_REQD, `option ${option}`)
    }
    for (const option of [3, 7, 99]) {
      const [reply] = await ask(peer, optionMessage(option, Buffer.alloc(300_000)))
      assert.equal(reply?.type, NBD_REP_ERR_TLS_REQD, `option ${option}, too long to read`)
    }
    const [withData] = await ask(peer, optionMessage(NBD_OPT_STARTTLS, Buffer.from('x')))
    assert.equal(withData?.type, NBD_REP_ERR_INVALID)
    const [aborted] = await ask(peer, optionMessage(NBD_OPT_ABORT))
    assert.equal(aborted?.type, ACK)
    const other = new RawPeer(target)
    await greet(other)
    other.send(optionMessage(1))
    assert.equal((await other.rest()).length, 0)
  })

  test('while the server ends, before TLS only STARTTLS is told so: the others are still ERR_TLS_REQD', async (t) => {
    const { keysFile } = makeCredentials(t)
    const files = { kind: 'psk', file: keysFile } as const
    const flushed = Promise.withResolvers<void>()
    const begun = Promise.withResolvers<void>()
    class SlowFlush extends Filter {
      override flush(): Promise<void> {
        begun.resolve()
        return flushed.promise
      }
    }
    const tls = await loadServerTls({ files })
    const { target, server } = await serveDevice(t, new SlowFlush(new MemoryDevice(SIZE)), { tls })
    const peer = new RawPeer(target)
    t.after(() => peer.socket.destroy())
    await greet(peer)
    const busy = await connectNbd({ ...target, tls: { files, username: 'alice' } })
    const flush = busy.flush()
    await begun.promise
    assert.equal((await ask(peer, optionMessage(99)))[0]?.type, NBD_REP_ERR_TLS_REQD)
    const end = server.close()
    for (const [option, error] of [
      [NBD_OPT_STARTTLS, NBD_REP_ERR_SHUTDOWN],
      [7, NBD_REP_ERR_TLS_REQD],
      [99, NBD_REP_ERR_TLS_REQD],
    ] as const)
      assert.equal((await ask(peer, optionMessage(option)))[0]?.type, error, `option ${option}`)
    flushed.resolve()
    await flush
    await end
    await busy.close()
  })

  test('a client that knows no fixed newstyle cannot begin TLS, so its connection ends', async (t) => {
    const { keysFile } = makeCredentials(t)
    const { target } = await serve(t, await loadServerTls({ files: { kind: 'psk', file: keysFile } }))
    for (const flags of [0, 2]) {
      const peer = new RawPeer(target)
      await greet(peer, flags)
      assert.equal((await peer.rest()).length, 0)
    }
  })

  test('after TLS began, STARTTLS is invalid, and nothing is answered with ERR_TLS_REQD', async (t) => {
    const { folder } = makeCredentials(t)
    const { target } = await serve(t, await loadServerTls({ files: { kind: 'x509', folder } }))
    const peer = new RawPeer(target)
    await greet(peer)
    await ask(peer, optionMessage(NBD_OPT_STARTTLS))
    peer.socket.removeAllListeners('data')
    const ca = fs.readFileSync(path.join(folder, 'ca-cert.pem'))
    const secure = tls.connect({ socket: peer.socket, servername: 'localhost', ca })
    t.after(() => secure.destroy())
    const options = [NBD_OPT_STARTTLS, 99, 3]
    secure.write(Buffer.concat(options.map((option) => optionMessage(option, u32(1)))))
    let said = Buffer.alloc(0)
    for await (const piece of secure) {
      said = Buffer.concat([said, piece as Buffer])
      if (repliesIn(said).length === options.length) break
    }
    assert.deepEqual(repliesIn(said), [NBD_REP_ERR_INVALID, NBD_REP_ERR_UNSUP, NBD_REP_ERR_INVALID])
  })

  test('what is sent in the clear right behind STARTTLS ends the connection', async (t) => {
    const { keysFile } = makeCredentials(t)
    const { target } = await serve(t, await loadServerTls({ files: { kind: 'psk', file: keysFile } }))
    const peer = new RawPeer(target)
    await greet(peer)
    peer.send(optionMessage(NBD_OPT_STARTTLS), goMessage(''))
    const answer = await peer.rest()
    assert.ok(answer.length <= 20, 'at most the acknowledgement was sent')
  })

  test('a client that speaks no TLS after STARTTLS costs its connection only', async (t) => {
    const { folder } = makeCredentials(t)
    const { target, server } = await serve(t, await loadServerTls({ files: { kind: 'x509', folder } }))
    const peer = new RawPeer(target)
    await greet(peer)
    await ask(peer, optionMessage(NBD_OPT_STARTTLS))
    peer.send(Buffer.alloc(4096, 0x41))
    await peer.rest()
    const client = await connectNbd({ ...target, tls: { files: { kind: 'x509', folder } } })
    await client.close()
    await server.close()
    assert.equal(server.connections, 0)
  })

  test('credentials that are missing or cannot be used are named', async (t) => {
    const { folder, keysFile } = makeCredentials(t)
    await assert.rejects(
      loadServerTls({ files: { kind: 'x509', folder: '/nowhere' } }),
      fails('not-found', '/nowhere/server-cert.pem'),
    )
    await assert.rejects(
      loadClientTls({ files: { kind: 'psk', file: keysFile }, username: 'zoe' }, 'localhost'),
      fails('not-found', 'zoe'),
    )
    fs.writeFileSync(path.join(folder, 'server-key.pem'), 'no key')
    await assert.rejects(loadServerTls({ files: { kind: 'x509', folder } }), fails('invalid-format', folder))
    for (const content of ['', 'alice', 'alice:zz', 'alice:abcd']) {
      fs.writeFileSync(keysFile, content)
      await assert.rejects(loadServerTls({ files: { kind: 'psk', file: keysFile } }), fails('invalid-format', keysFile))
    }
  })
})
