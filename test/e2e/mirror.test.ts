// Mirrors as a user has them: every way to end one under a guest that writes, modes changed by hand and by themselves, targets that
// vanish, fill up or were never right, and kills in the middle.

import assert from 'node:assert/strict'
import { type ChildProcess, spawn } from 'node:child_process'
import fs from 'node:fs'
import { type TestContext, test } from 'node:test'
import { setTimeout as delay } from 'node:timers/promises'
import { Random } from '../../src/base/random.ts'
import type { JobReply } from '../../src/api/schema.ts'
import type { NbdClient } from '../../src/nbd/client.ts'
import { missing, peer } from '../support/peer.ts'
import { MIB, notRoot, saysSoon, Site, STATUS } from '../support/site.ts'

const SIZE = 16 * MIB
const BLOCK = 4096
/** The guest leaves the rest alone. */
const WRITTEN = 12 * MIB

interface Setting {
  readonly site: Site
  readonly guest: Writer
}

/** A disk of 16 MiB, half of it with data, and a guest of it. */
async function setUp(t: TestContext): Promise<Setting> {
  const site = await Site.start()
  t.after(() => site.end())
  await site.disk('vm1', '16M')
  const guest = new Writer(await site.guest('vm1'))
  t.after(() => guest.stop())
  await guest.fill()
  return { site, guest }
}

/** Writes one block after the other, each with the next number, and knows what the disk holds. */
class Writer {
  readonly content = Buffer.alloc(SIZE)
  readonly #client: NbdClient
  readonly #random = new Random(7)
  #number = 0
  #isRunning = false
  #work: Promise<void> = Promise.resolve()

  constructor(client: NbdClient) {
    this.#client = client
  }

  /** The number of the last write that was acknowledged. */
  get acknowledged(): number {
    return this.#number
  }

  async fill(): Promise<void> {
    this.#random.fill(this.content.subarray(0, SIZE / 2))
    await this.#client.write(0, SIZE / 2, this.content, 0, 0)
  }

  async write(): Promise<void> {
    const number = this.#number + 1
    const at = BLOCK * this.#random.below(WRITTEN / BLOCK)
    const block = this.content.subarray(at, at + BLOCK)
    this.#random.fill(block)
    block.writeUInt32LE(number, 0)
    await this.#client.write(at, BLOCK, this.content, at, 0)
    this.#number = number
  }

  start(): void {
    this.#isRunning = true
    this.#work = (async () => {
      while (this.#isRunning) await this.write()
    })()
    this.#work.catch(() => undefined)
  }

  async pause(): Promise<void> {
    this.#isRunning = false
    await this.#work
  }

  async stop(): Promise<void> {
    await this.pause().catch(() => undefined)
    await this.#client.close().catch(() => undefined)
  }

  /** Fails unless the disk holds what was written. */
  async check(): Promise<void> {
    const found = Buffer.alloc(SIZE)
    await this.#client.read(0, SIZE, found, 0)
    assert.ok(found.equals(this.content), 'the disk holds what was written')
  }
}

/** What an image holds, by QEMU. */
function contentOf(site: Site, image: string, format: string): Buffer {
  const raw = site.path('content.raw')
  peer('qemu-img', 'convert', '-U', '-f', format, '-O', 'raw', image, raw)
  return fs.readFileSync(raw)
}

/** An NBD server of nbdkit on a file, which can be killed and started again. */
class Server {
  readonly uri: string
  readonly #args: readonly string[]
  #child: ChildProcess | undefined

  constructor(t: TestContext, site: Site, ...args: string[]) {
    const socket = site.path('target.sock')
    this.uri = `nbd+unix:///?socket=${socket}`
    this.#args = ['-f', '-U', socket, ...args]
    t.after(() => this.kill())
  }

  async start(): Promise<void> {
    const socket = this.#args[2] ?? ''
    fs.rmSync(socket, { force: true })
    this.#child = spawn('nbdkit', this.#args, { stdio: 'ignore' })
    for (let waited = 0; !fs.existsSync(socket); waited += 20) {
      assert.ok(waited < 10_000, 'nbdkit listens')
      await delay(20)
    }
  }

  /** It lives, holds its connections, and does nothing. */
  stall(): void {
    this.#child?.kill('SIGSTOP')
  }

  async kill(): Promise<void> {
    const child = this.#child
    this.#child = undefined
    if (child === undefined) return
    const ended = new Promise((resolve) => child.once('exit', resolve))
    child.kill('SIGKILL')
    await ended
  }
}

function holdsOf({ details }: JobReply): string {
  return String(details['holds'])
}

async function begin(site: Site, ...args: string[]): Promise<string> {
  const said = await site.done('mirror', 'vm1', ...args, '--no-wait', '--json')
  return (JSON.parse(said) as { id: string }).id
}

const isReady = ({ state }: JobReply): boolean => state === 'ready'
const hasEnded = ({ endedMs }: JobReply): boolean => endedMs !== undefined

for (const format of ['raw', 'qcow2'] as const) {
  test(`a mirror to a new ${format} image is completed under a guest that writes: the copy is of one moment after that was asked`, async (t) => {
    const { site, guest } = await setUp(t)
    const target = site.path(`copy.${format}`)
    guest.start()
    const said = await site.done('mirror', 'vm1', target, '-f', format)
    const [, id = ''] = /^(mirror-\w+): ready; .*varve job complete/.exec(said) ?? []
    const before = guest.acknowledged
    assert.match(await site.done('job', 'complete', id), /concluded; .* holds the disk as it was at 20/)
    const after = guest.acknowledged
    await guest.pause()
    await guest.check()
    const copy = contentOf(site, target, format)
    const numbers: number[] = []
    for (let at = 0; at < SIZE; at += BLOCK)
      if (!copy.subarray(at, at + BLOCK).equals(guest.content.subarray(at, at + BLOCK)))
        numbers.push(guest.content.readUInt32LE(at))
    // Whatever differs was written after the moment: by a write that had not been acknowledged when the end was asked for.
    assert.ok(
      numbers.every((number) => number > before),
      `${numbers.filter((n) => n <= before).length} writes are missing`,
    )
    assert.ok(after >= before)
    const { layers } = await site.daemon.api.call('showDisk', { disk: 'vm1' }, {})
    assert.deepEqual(
      layers.map(({ path }) => path),
      [site.path('vm1.qcow2')],
    )
    assert.ok(fs.statSync(target).blocks * 512 < WRITTEN + MIB, 'sparse stays sparse')
  })
}

test('a pivot moves the disk under a guest that writes, leaves the old images, and ends the snapshots when told', async (t) => {
  const { site, guest } = await setUp(t)
  await site.done('snapshot', 'create', 'vm1', 'monday')
  guest.start()
  const target = site.path('moved.qcow2')
  await site.refuses(
    ['mirror', 'vm1', target, '-f', 'qcow2', '--pivot'],
    STATUS.usage,
    /ends the snapshots monday: say --yes/,
  )
  const said = await site.done('mirror', 'vm1', target, '-f', 'qcow2', '--pivot', '--yes')
  assert.match(said, /holds disk vm1 itself; no longer used, and left where it is: .*vm1.qcow2, .*vm1.varve-1.qcow2/)
  await guest.pause()
  await guest.check()
  const { layers } = await site.daemon.api.call('showDisk', { disk: 'vm1' }, {})
  assert.deepEqual(
    layers.map(({ path }) => path),
    [target],
  )
  assert.equal(await site.done('snapshot', 'list', 'vm1', '--json'), '[]')
  await guest.write()
  await guest.check()
  await site.daemon.stop()
  peer('qemu-img', 'check', '-q', '-f', 'qcow2', target)
  assert.ok(contentOf(site, target, 'qcow2').equals(guest.content))
})

test('a pivot of the top keeps what lies below, and its snapshots', async (t) => {
  const { site, guest } = await setUp(t)
  await site.done('snapshot', 'create', 'vm1', 'monday')
  for (let write = 0; write < 20; write++) await guest.write()
  const target = site.path('top.qcow2')
  await site.done('mirror', 'vm1', target, '-f', 'qcow2', '--sync', 'top', '--pivot')
  await guest.check()
  const { layers } = await site.daemon.api.call('showDisk', { disk: 'vm1' }, {})
  assert.deepEqual(
    layers.map(({ path }) => path),
    [site.path('vm1.qcow2'), target],
  )
  assert.ok(fs.statSync(target).size < 4 * MIB, 'only what the top owns was copied')
  await site.daemon.stop()
  assert.ok(contentOf(site, target, 'qcow2').equals(guest.content))
})

test('a copy is brought up to date by a bitmap, and by nothing but new writes', async (t) => {
  const { site, guest } = await setUp(t)
  const target = site.path('copy.raw')
  await site.done('mirror', 'vm1', target, '-f', 'raw', '--complete')
  // A backup leaves a bitmap that records what is written from here on.
  await site.done('backup', 'vm1', '--repo', site.repository)
  const { bitmaps } = await site.daemon.api.call('showDisk', { disk: 'vm1' }, {})
  const name = bitmaps[0]?.name ?? ''
  for (let write = 0; write < 20; write++) await guest.write()
  const update = ['-f', 'raw', '--existing', '--complete']
  await site.done('mirror', 'vm1', target, ...update, '--sync', 'bitmap', '--bitmap', name)
  assert.ok(fs.readFileSync(target).equals(guest.content))
  const id = await begin(site, target, '-f', 'raw', '--existing', '--sync', 'none')
  await site.job(id, isReady)
  for (let write = 0; write < 20; write++) await guest.write()
  await site.done('job', 'complete', id)
  assert.ok(fs.readFileSync(target).equals(guest.content))
})

test('the mode is changed while a mirror runs, and a cancel says what the target holds', async (t) => {
  const { site, guest } = await setUp(t)
  const target = site.path('copy.raw')
  const id = await begin(site, target, '-f', 'raw', '--mode', 'background')
  await site.job(id, isReady)
  for (const mode of ['write-blocking', 'background', 'write-blocking']) {
    await site.done('job', 'set-mode', id, mode)
    await site.job(id, ({ details }) => details['mode'] === mode)
    await guest.write()
  }
  assert.ok(fs.readFileSync(target).equals(guest.content), 'what is written goes to both')
  await site.done('job', 'pause', id)
  await site.refuses(['job', 'complete', id], STATUS.busy, /is standby: complete cannot be said now/)
  await site.refuses(['job', 'set-mode', id, 'fast'], STATUS.usage, /fast is no mode/)
  await site.done('job', 'cancel', id)
  const ended = await site.job(id, hasEnded)
  assert.equal(ended.error?.kind, 'cancelled')
  assert.match(holdsOf(ended), /it is no copy/)
  assert.match(await site.done('job', 'show', id), /copy.raw holds .*no copy/)
  await guest.check()
})

test('a guest that is faster than the target has the mirror change to write-blocking by itself, which says why and then ends', {
  skip: missing('nbdkit'),
}, async (t) => {
  const { site, guest } = await setUp(t)
  const file = site.path('slow.raw')
  fs.writeFileSync(file, '')
  fs.truncateSync(file, SIZE)
  const rate = site.path('rate')
  fs.writeFileSync(rate, '8M')
  const server = new Server(t, site, '--filter=rate', 'file', file, 'rate=8M', `rate-file=${rate}`)
  await server.start()
  guest.start()
  const id = await begin(site, server.uri, '--complete')
  await site.job(id, ({ details }) => details['reason'] !== undefined)
  fs.writeFileSync(rate, '4G')
  const ended = await site.job(id, hasEnded)
  assert.equal(ended.error, undefined)
  assert.match(String(ended.details['reason']), /write-blocking since the guest changes .* a second, and .* are copied/)
  await guest.pause()
  await guest.check()
})

for (const mode of ['background', 'write-blocking'] as const) {
  test(`an NBD target that vanishes pauses the mirror (${mode}), never the guest; it goes on when the target is back`, {
    skip: missing('nbdkit'),
  }, async (t) => {
    const { site, guest } = await setUp(t)
    const file = site.path('remote.raw')
    fs.writeFileSync(file, '')
    fs.truncateSync(file, SIZE)
    const server = new Server(t, site, 'file', file)
    await server.start()
    const id = await begin(site, server.uri, '--mode', mode, '--speed', '2M')
    await site.job(id, ({ done }) => done > 2 * MIB)
    await server.kill()
    const waiting = await site.job(id, ({ state, error }) => state === 'paused' && error !== undefined)
    assert.match(waiting.error?.message ?? '', /target\.sock/)
    for (let write = 0; write < 50; write++) await guest.write()
    await site.done('job', 'set-speed', id, '0')
    await site.done('job', 'resume', id)
    await site.job(id, ({ state, error }) => state === 'paused' && error !== undefined)
    await server.start()
    await site.done('job', 'resume', id)
    await site.job(id, isReady)
    // Once more, while it is ready.
    await server.kill()
    for (let write = 0; write < 50; write++) await guest.write()
    await site.job(id, ({ state }) => state === 'standby')
    await server.start()
    await site.done('job', 'resume', id)
    await site.done('job', 'complete', id)
    await guest.check()
    assert.ok(fs.readFileSync(file).equals(guest.content))
  })
}

test('an NBD target that answers nothing any more pauses the mirror, and the guest whose writes go to both goes on', {
  skip: missing('nbdkit'),
}, async (t) => {
  const { site, guest } = await setUp(t)
  const file = site.path('remote.raw')
  fs.writeFileSync(file, '')
  fs.truncateSync(file, SIZE)
  const server = new Server(t, site, 'file', file)
  await server.start()
  const id = await begin(site, server.uri, '--mode', 'write-blocking')
  await site.job(id, isReady)
  server.stall()
  await guest.write()
  const waiting = await site.job(id, ({ state }) => state === 'standby')
  assert.match(waiting.error?.message ?? '', /has not answered for 10 s/)
  await server.kill()
  await server.start()
  await guest.write()
  await site.done('job', 'resume', id)
  await site.done('job', 'complete', id)
  await guest.check()
  assert.ok(fs.readFileSync(file).equals(guest.content))
})

test('a target that runs full pauses the mirror, which goes on when there is room', { skip: notRoot }, async (t) => {
  const { site, guest } = await setUp(t)
  const small = site.path('small')
  site.smallFileSystem(small, 4)
  const follower = site.begin('mirror', 'vm1', `${small}/copy.raw`, '-f', 'raw', '--complete')
  const [job] = await site.running()
  const id = job?.id ?? ''
  const waiting = await site.job(id, ({ state, error }) => state === 'paused' && error !== undefined)
  assert.equal(waiting.error?.kind, 'no-space')
  await saysSoon(follower, /waits: .*no space left.*varve job resume mirror-/)
  for (let write = 0; write < 50; write++) await guest.write()
  await guest.check()
  site.smallFileSystem(small, 64)
  await site.done('job', 'resume', id)
  const { status, stderr } = await follower.ended
  assert.equal(status, STATUS.done, stderr)
  assert.ok(fs.readFileSync(`${small}/copy.raw`).equals(guest.content))
})

test('a mirror with a pivot that is killed at any time goes on, and the disk is whole', async (t) => {
  const { site, guest } = await setUp(t)
  await guest.stop()
  const random = new Random(11)
  for (let kill = 0; kill < 6; kill++) {
    const writer = await site.guest('vm1')
    const id = await begin(site, site.path(`place-${kill}.qcow2`), '-f', 'qcow2', '--pivot', '--speed', '32M')
    for (let write = 0; write < 20; write++) {
      const at = BLOCK * random.below(SIZE / BLOCK)
      random.fill(guest.content.subarray(at, at + BLOCK))
      await writer.write(at, BLOCK, guest.content, at, 0)
    }
    await delay(random.below(400))
    await site.daemon.kill()
    await writer.close().catch(() => undefined)
    await site.daemon.start()
    const ended = await site.job(id, hasEnded).catch(() => undefined)
    assert.equal(ended?.error, undefined)
    const again = await site.guest('vm1')
    const found = Buffer.alloc(SIZE)
    await again.read(0, SIZE, found, 0)
    await again.close()
    assert.ok(found.equals(guest.content), `kill ${kill}: the disk holds what was acknowledged`)
    const { layers } = await site.daemon.api.call('showDisk', { disk: 'vm1' }, {})
    assert.deepEqual(
      layers.map(({ path }) => path),
      [site.path(`place-${kill}.qcow2`)],
    )
  }
})

test('a target that cannot be is refused in one line, and nothing is changed', async (t) => {
  const { site, guest } = await setUp(t)
  const small = site.image('small.raw', '8M')
  const large = site.image('large.raw', '32M')
  const overlay = site.image('overlay.qcow2', '16M', '-b', large, '-F', 'raw')
  const right = site.image('right.raw', '16M')
  const link = site.path('link.raw')
  fs.linkSync(site.path('vm1.qcow2'), link)
  const { uri } = await site.daemon.api.call('showDisk', { disk: 'vm1' }, {})
  const kept = [small, large, overlay, right].map((file) => [file, fs.readFileSync(file)] as const)
  const before = await site.state()
  const to = (target: string, ...args: string[]): string[] => ['mirror', 'vm1', target, ...args]
  const refusals: readonly [args: string[], status: number, says: RegExp][] = [
    [
      to(small, '-f', 'raw', '--existing'),
      STATUS.usage,
      /small\.raw has 8388608 bytes, and disk vm1 16777216: make it larger/,
    ],
    [to(right, '-f', 'raw'), STATUS.busy, /right\.raw is there already: --existing writes over it/],
    [to(site.path('none.raw'), '-f', 'raw', '--existing'), STATUS.notFound, /none\.raw does not exist/],
    [to(site.path('none', 'x.raw'), '-f', 'raw'), STATUS.notFound, /the folder .* does not exist/],
    [to(site.path('x.raw')), STATUS.usage, /say the format of the target/],
    [to(site.path('vm1.qcow2'), '-f', 'qcow2', '--existing'), STATUS.busy, /belongs to disk vm1/],
    [to(link, '-f', 'raw', '--existing'), STATUS.busy, /is the same file as .*vm1\.qcow2, which belongs to disk vm1/],
    [to(uri ?? '', '--mode', 'background'), STATUS.busy, /is disk vm1 itself/],
    [
      to(overlay, '-f', 'qcow2', '--existing'),
      STATUS.usage,
      /lies on .*large\.raw: a mirror with --sync full needs one without/,
    ],
    [to(large, '-f', 'raw', '--existing', '--pivot'), STATUS.usage, /both need the same size/],
    [to(site.path('x.qcow2'), '-f', 'qcow2', '--sync', 'top'), STATUS.usage, /has one layer/],
    [to(site.path('x.raw'), '-f', 'raw', '--sync', 'none'), STATUS.usage, /brings a copy up to date/],
    [to(right, '-f', 'raw', '--existing', '--sync', 'bitmap', '--bitmap', 'no'), STATUS.notFound, /has no bitmap no/],
    [to(right, '-f', 'raw', '--existing', '--sync', 'bitmap'), STATUS.usage, /go together/],
    [to('nbd+unix:///?socket=/nowhere.sock'), STATUS.notFound, /nowhere/],
    [to('nbd+unix:///?socket=/nowhere.sock', '-f', 'qcow2'), STATUS.usage, /without -f/],
    [to(right, '-f', 'raw', '--existing', '--complete', '--pivot'), STATUS.usage, /--complete or --pivot, not both/],
  ]
  for (const [args, status, says] of refusals) await site.refuses(args, status, says)
  assert.deepEqual(await site.state(), before)
  for (const [file, bytes] of kept) assert.ok(fs.readFileSync(file).equals(bytes), `${file} is as it was`)
  assert.ok(['x.raw', 'x.qcow2'].every((name) => !fs.existsSync(site.path(name))))
  await guest.check()
})

test('a target that is read-only or in use is refused, and while a mirror runs whatever changes the chain', {
  skip: missing('qemu-nbd', 'nbdkit'),
}, async (t) => {
  const { site, guest } = await setUp(t)
  const right = site.image('right.raw', '16M')
  const server = new Server(t, site, '-r', 'file', right)
  await server.start()
  await site.refuses(['mirror', 'vm1', server.uri], STATUS.failed, /is served read-only/)
  await server.kill()
  const holder = spawn('qemu-nbd', ['-t', '-f', 'raw', '-k', site.path('q.sock'), right], { stdio: 'ignore' })
  t.after(() => holder.kill())
  while (!fs.existsSync(site.path('q.sock'))) await delay(20)
  await site.refuses(['mirror', 'vm1', right, '-f', 'raw', '--existing'], STATUS.busy, /in use by/)
  const target = site.path('copy.raw')
  const id = await begin(site, target, '-f', 'raw')
  await site.job(id, isReady)
  const refused = [
    ['snapshot', 'create', 'vm1', 'now'],
    ['mirror', 'vm1', site.path('other.raw'), '-f', 'raw'],
    ['disk', 'remove', 'vm1'],
  ]
  for (const args of refused) await site.refuses(args, STATUS.busy, new RegExp(id))
  await site.done('job', 'complete', id)
  assert.ok(fs.readFileSync(target).equals(guest.content))
})

test('a block device is a target, and a disk goes on there', { skip: notRoot || missing('losetup') }, async (t) => {
  const { site, guest } = await setUp(t)
  const file = site.image('device.raw', '16M')
  const device = peer('losetup', '--show', '-f', file).trim()
  t.after(() => peer('losetup', '-d', device))
  await site.refuses(['mirror', 'vm1', device, '-f', 'raw'], STATUS.busy, /is there already: --existing/)
  await site.done('mirror', 'vm1', device, '-f', 'raw', '--existing', '--pivot')
  await guest.write()
  await guest.check()
  const { layers } = await site.daemon.api.call('showDisk', { disk: 'vm1' }, {})
  assert.deepEqual(
    layers.map(({ path }) => path),
    [device],
  )
  await site.daemon.stop()
})
