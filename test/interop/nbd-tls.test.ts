// TLS with other people's programs: libnbd's and QEMU's clients against our server, nbdkit and qemu-nbd against our client, with
// certificates and with pre-shared keys.

import assert from 'node:assert/strict'
import { execFile, spawn } from 'node:child_process'
import fs from 'node:fs'
import net from 'node:net'
import path from 'node:path'
import { type TestContext, suite, test } from 'node:test'
import { promisify } from 'node:util'
import { Random } from '../../src/base/random.ts'
import { MemoryDevice } from '../../src/block/memory.ts'
import { connectNbd } from '../../src/nbd/client.ts'
import { type ClientTlsOptions, loadServerTls } from '../../src/nbd/tls.ts'
import { formatNbdUri, type NbdUri } from '../../src/nbd/uri.ts'
import { serveDevice } from '../support/nbd.ts'
import { missing } from '../support/peer.ts'
import { type Credentials, makeCredentials } from '../support/tls.ts'

const MIB = 1024 * 1024
const SIZE = 8 * MIB
const run = promisify(execFile)

async function output(program: string, ...args: string[]): Promise<string> {
  return (await run(program, args, { timeout: 60_000, maxBuffer: 64 * MIB })).stdout
}

const KINDS = ['x509', 'psk'] as const
type Kind = (typeof KINDS)[number]

function clientOptions(kind: Kind, { folder, keysFile }: Credentials): ClientTlsOptions {
  if (kind === 'psk') return { files: { kind, file: keysFile }, username: 'alice' }
  return { files: { kind, folder }, hostname: 'localhost' }
}

/** Serves 8 MiB of noise. */
async function serveOverTls(t: TestContext, kind: Kind, place: 'unix' | 'tcp', credentials: Credentials) {
  const { folder, keysFile } = credentials
  const files = kind === 'x509' ? ({ kind, folder } as const) : ({ kind, file: keysFile } as const)
  const tls = await loadServerTls({ files, verifyPeer: kind === 'x509' })
  const memory = new MemoryDevice(SIZE)
  await memory.write(0, SIZE, new Random(3).fill(Buffer.alloc(SIZE)), 0, 0)
  const { target } = await serveDevice(t, memory, { place, tls })
  return { memory, target, uri: formatNbdUri({ ...target, tls: clientOptions(kind, credentials) } as NbdUri) }
}

suite('NBD over TLS with other programs', { skip: missing('openssl') }, () => {
  for (const kind of KINDS) {
    for (const place of ['unix', 'tcp'] as const) {
      test(`nbdinfo and nbdcopy read and write what we serve: ${kind}, ${place}`, {
        skip: missing('nbdinfo', 'nbdcopy'),
      }, async (t) => {
        const credentials = makeCredentials(t)
        const { memory, uri } = await serveOverTls(t, kind, place, credentials)
        const info = JSON.parse(await output('nbdinfo', '--json', uri)) as Record<string, unknown>
        assert.equal(info['TLS'], true)
        const file = path.join(credentials.folder, 'copy.raw')
        await output('nbdcopy', uri, file)
        assert.ok(fs.readFileSync(file).equals(memory.bytes))
        fs.writeFileSync(file, new Random(4).fill(Buffer.alloc(SIZE)))
        await output('nbdcopy', '--flush', file, uri)
        assert.ok(fs.readFileSync(file).equals(memory.bytes))
      })
    }

    test(`qemu-io writes and reads what we serve: ${kind}`, { skip: missing('qemu-io') }, async (t) => {
      const credentials = makeCredentials(t)
      const { memory, target } = await serveOverTls(t, kind, 'tcp', credentials)
      assert.ok(target.transport === 'tcp')
      const user = kind === 'psk' ? ',username=alice' : ''
      const object = `tls-creds-${kind},id=tls,endpoint=client,dir=${credentials.folder}${user}`
      const where = `driver=nbd,host=localhost,port=${target.port},tls-creds=tls`
      const commands = ['-c', 'write -P 7 1M 3M', '-c', 'read -P 7 1M 3M', '-c', 'flush']
      const said = await output('qemu-io', '--object', object, '--image-opts', ...commands, where)
      assert.ok(!said.includes('failed'), said)
      assert.ok(memory.bytes.subarray(MIB, 4 * MIB).every((byte) => byte === 7))
    })

    test(`our client reads and writes what nbdkit serves: ${kind}`, { skip: missing('nbdkit') }, async (t) => {
      const credentials = makeCredentials(t)
      const socket = path.join(credentials.folder, 'nbdkit.sock')
      const how = kind === 'psk' ? `--tls-psk=${credentials.keysFile}` : `--tls-certificates=${credentials.folder}`
      const server = spawn('nbdkit', ['-f', '-U', socket, '--tls=require', how, 'memory', String(SIZE)])
      t.after(() => server.kill())
      await answers(socket)
      await writeAndReadBack({ transport: 'unix', path: socket, name: '', tls: clientOptions(kind, credentials) })
    })

    test(`our client reads and writes what qemu-nbd serves: ${kind}`, { skip: missing('qemu-nbd') }, async (t) => {
      const credentials = makeCredentials(t)
      const { folder } = credentials
      const socket = path.join(folder, 'qemu.sock')
      const image = path.join(folder, 'image.raw')
      fs.writeFileSync(image, Buffer.alloc(SIZE))
      const verify = kind === 'x509' ? ',verify-peer=yes' : ''
      const object = `tls-creds-${kind},id=tls,endpoint=server,dir=${folder}${verify}`
      const args = ['--object', object, '--tls-creds', 'tls', '-k', socket, '-t', '-f', 'raw', image]
      const server = spawn('qemu-nbd', args)
      t.after(() => server.kill())
      await answers(socket)
      await writeAndReadBack({ transport: 'unix', path: socket, name: '', tls: clientOptions(kind, credentials) })
    })
  }
})

/** Waits until somebody listens there. */
async function answers(socket: string): Promise<void> {
  const deadline = performance.now() + 20_000
  for (;;) {
    const probe = net.connect(socket)
    const isThere = await new Promise<boolean>((resolve) => {
      probe.once('connect', () => resolve(true))
      probe.once('error', () => resolve(false))
    })
    probe.destroy()
    if (isThere) return
    assert.ok(performance.now() < deadline, `nobody listens on ${socket}`)
    await new Promise((resolve) => setTimeout(resolve, 20))
  }
}

async function writeAndReadBack(target: NbdUri): Promise<void> {
  const client = await connectNbd(target)
  const bytes = new Random(5).fill(Buffer.alloc(2 * MIB + 77))
  await client.write(4096, bytes.length, bytes, 0, 0)
  await client.flush()
  const back = Buffer.alloc(bytes.length)
  await client.read(4096, back.length, back, 0)
  assert.ok(back.equals(bytes))
  await client.close()
}
