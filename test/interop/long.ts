// The long NBD run: fio reads and writes at random, with flushes, and verifies every block that it wrote, with md5 and crc32c, on `varve nbd`
// with a raw and a qcow2 image, by every way that a client has, in turn until the time is over. It ends with the sum of the operations,
// the errors and what verifying found, and with exit status 1 if that is anything. `npm test` runs a little of the same
// (nbd-peers.test.ts).
//
//   node test/interop/long.ts [--seconds 600]       needs fio, nbdkit, openssl and qemu-img

import assert from 'node:assert/strict'
import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import path from 'node:path'
import { type TestContext, test } from 'node:test'
import { parseArgs } from 'node:util'
import { parseNbdUri } from '../../src/nbd/uri.ts'
import { peer } from '../support/peer.ts'
import { tempFolder } from '../support/temp.ts'
import { placeOf, type Reached, reachedBy, secureBy, verifyByFio, type Way, WAYS } from './nbd-ways.ts'

const MIB = 1024 * 1024
/** The disk, and what is read and written of it before the next has its turn. */
const SIZE = 128 * MIB
const IO_SIZE = 128 * MIB
const MAIN = path.resolve(import.meta.dirname, '..', '..', 'src', 'cli', 'main.ts')

const { values } = parseArgs({ options: { seconds: { type: 'string', default: '600' } } })

interface ServedImage {
  readonly name: string
  readonly image: string
  readonly format: 'raw' | 'qcow2'
  readonly reached: Reached
  readonly server: ChildProcess
}

/** Serves a new image by `varve nbd`, until it is told to end. */
async function serveImage(t: TestContext, way: Way, format: ServedImage['format']): Promise<ServedImage> {
  const folder = tempFolder(t)
  const image = path.join(folder, `disk.${format}`)
  peer('qemu-img', 'create', '-q', '-f', format, image, String(SIZE))
  const security = await secureBy(t, way)
  const files = security?.client.files
  const place = placeOf(way) === 'unix' ? ['--socket', path.join(folder, 'nbd.sock')] : ['--port', '0']
  const keys = files?.kind === 'psk' ? ['--tls-psk', files.file] : []
  const certificates = files?.kind === 'x509' ? ['--tls-certificates', files.folder, '--tls-verify-peer'] : []
  const args = [MAIN, 'nbd', image, '-f', format, ...place, ...keys, ...certificates]
  const server = spawn(process.execPath, args, { stdio: ['ignore', 'pipe', 'inherit'] })
  t.after(() => server.kill('SIGKILL'))
  const [said] = (await once(server.stdout, 'data')) as [Buffer]
  const { tls: _, ...target } = parseNbdUri(said.toString().trim())
  return { name: `${format}, ${way}`, image, format, reached: reachedBy(target, security), server }
}

/** Ends the server and has QEMU check the image. */
async function endImage({ server, image, format }: ServedImage): Promise<void> {
  const ended = once(server, 'exit')
  server.kill('SIGTERM')
  const [status] = await ended
  assert.equal(status, 0, 'varve nbd ends well')
  if (format === 'qcow2') peer('qemu-img', 'check', '-q', '-f', format, image)
}

test('fio writes and reads at random, and every block is as written', async (t) => {
  const began = performance.now()
  const folder = tempFolder(t)
  const images: ServedImage[] = []
  for (const way of WAYS) for (const format of ['raw', 'qcow2'] as const) images.push(await serveImage(t, way, format))
  const total = { jobs: 0, reads: 0, writes: 0, flushes: 0, bytes: 0 }
  const failures: string[] = []
  const attempt = async (name: string, work: () => Promise<void>): Promise<void> => {
    await work().catch((error: unknown) => failures.push(`${name}: ${String(error)}`))
  }
  const isOver = (): boolean => performance.now() - began >= Number(values.seconds) * 1000
  while (!isOver()) {
    for (const verify of ['md5', 'crc32c'] as const) {
      for (const { name, reached } of images) {
        if (isOver()) break
        await attempt(`${name}, ${verify}`, async () => {
          const { reads, writes, flushes, bytes } = await verifyByFio(reached, {
            verify,
            size: SIZE,
            ioSize: IO_SIZE,
            seed: total.jobs,
            folder,
          })
          total.jobs++
          total.reads += reads
          total.writes += writes
          total.flushes += flushes
          total.bytes += bytes
          console.log(`${name}, ${verify}: ${reads} reads, ${writes} writes, ${flushes} flushes, all as written`)
        })
      }
    }
  }
  for (const image of images) await attempt(image.name, () => endImage(image))
  const { jobs, reads, writes, flushes, bytes } = total
  const seconds = Math.round((performance.now() - began) / 1000)
  for (const failure of failures) console.log(`FAILED ${failure}`)
  console.log(`${seconds} s, ${jobs} jobs of fio on ${images.length} servers; images checked by qemu-img`)
  console.log(`operations: ${reads} reads, ${writes} writes, ${flushes} flushes; ${Math.round(bytes / MIB)} MiB`)
  console.log(
    `errors: ${failures.length}; verified (md5, crc32c): ${failures.length === 0 ? 'every block as written' : 'see above'}`,
  )
  assert.equal(failures.length, 0)
})
