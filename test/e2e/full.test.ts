// No space left: in the repository, under a commit's target, under the guest itself, in scratch, and at home. The guest is told
// only of its own writes; a job waits for room, or, when told so, fails and leaves nothing behind.

import assert from 'node:assert/strict'
import fs from 'node:fs'
import path from 'node:path'
import { type TestContext, test } from 'node:test'
import { Random } from '../../src/base/random.ts'
import { isBlockError } from '../../src/block/error.ts'
import type { NbdClient } from '../../src/nbd/client.ts'
import { missing, peer } from '../support/peer.ts'
import { checkRefusal, MIB, notRoot, saysSoon, Site, STATUS } from '../support/site.ts'

const SKIP = { skip: notRoot || missing('qemu-img', 'mount') }

async function startSite(t: TestContext, ...args: string[]): Promise<Site> {
  const site = await Site.start({ args })
  t.after(() => site.end())
  return site
}

/** A guest that writes random data and knows what its disk must hold. */
class Guest {
  readonly content: Buffer<ArrayBuffer>
  readonly client: NbdClient
  readonly #random = new Random(7)

  constructor(client: NbdClient) {
    this.client = client
    this.content = Buffer.alloc(client.size)
  }

  /** Writes random data, a MiB at a time; what fails counts as not written. */
  async fill(from: number, to: number): Promise<void> {
    for (let offset = from; offset < to; offset += MIB) {
      const data = Buffer.alloc(MIB)
      this.#random.fill(data)
      await this.client.write(offset, MIB, data, 0, 0)
      data.copy(this.content, offset)
    }
  }

  /** Reads the whole disk and compares. */
  async check(): Promise<void> {
    const found = Buffer.alloc(MIB)
    for (let offset = 0; offset < this.content.length; offset += MIB) {
      await this.client.read(offset, MIB, found, 0)
      assert.ok(found.equals(this.content.subarray(offset, offset + MIB)), `the disk differs in the MiB at ${offset}`)
    }
  }

  /** Compares a raw image with what the disk must hold. */
  checkImage(image: string): void {
    assert.ok(fs.readFileSync(image).equals(this.content), `${image} differs from the disk`)
  }
}

interface Backup {
  readonly id: string
  readonly kind: string
}

async function backUp(site: Site, repository: string): Promise<Backup> {
  const said = await site.done('backup', 'vm1', '--repo', repository, '--json')
  const { details } = JSON.parse(said) as { details: { backup: string; disks: { kind: string }[] } }
  return { id: details.backup, kind: details.disks[0]?.kind ?? '' }
}

async function checkRestore(site: Site, repository: string, id: string, guest: Guest): Promise<void> {
  const image = site.path(`${id}.raw`)
  await site.done('restore', id, '--repo', repository, '--to', image)
  guest.checkImage(image)
}

interface SmallRepository {
  readonly site: Site
  /** The folder of its file system. */
  readonly small: string
  readonly repository: string
  readonly guest: Guest
}

/** A disk of 32 MiB and its guest, and a repository with room for 12. */
async function setUpSmallRepository(t: TestContext): Promise<SmallRepository> {
  const site = await startSite(t)
  const small = site.path('small')
  site.smallFileSystem(small, 12)
  const repository = path.join(small, 'repository')
  await site.done('repo', 'init', repository)
  await site.disk('vm1', '32M')
  return { site, small, repository, guest: new Guest(await site.guest('vm1')) }
}

test(
  'a backup to a full repository that reports errors fails, shows nothing, and the next one is incremental',
  SKIP,
  async (t) => {
    const { site, small, repository, guest } = await setUpSmallRepository(t)
    await guest.fill(0, 4 * MIB)
    assert.equal((await backUp(site, repository)).kind, 'full')

    await guest.fill(2 * MIB, 18 * MIB)
    const report = ['backup', 'vm1', '--repo', repository, '--on-error', 'report']
    await site.refuses(report, STATUS.failed, /no space left/)
    const listed = JSON.parse(await site.done('repo', 'list', repository, '--json')) as unknown[]
    assert.equal(listed.length, 1)
    await guest.fill(20 * MIB, 22 * MIB)
    await guest.check()

    site.smallFileSystem(small, 64)
    const next = await backUp(site, repository)
    assert.equal(next.kind, 'incremental')
    await checkRestore(site, repository, next.id, guest)
    await guest.client.close()
  },
)

test('a backup to a full repository waits for room, and is of its own moment all the same', SKIP, async (t) => {
  const { site, small, repository, guest } = await setUpSmallRepository(t)
  await guest.fill(0, 20 * MIB)
  const moment = Buffer.from(guest.content)

  const follower = site.begin('backup', 'vm1', '--repo', repository, '--json')
  const [job] = await site.running()
  assert.ok(job !== undefined)
  const waiting = await site.job(job.id, ({ state }) => state === 'paused')
  assert.equal(waiting.error?.kind, 'no-space')
  await saysSoon(follower, /waits: .*no space left.*varve job resume backup-/)
  await guest.fill(0, 4 * MIB)
  await guest.check()
  // Without room it waits again.
  await site.done('job', 'resume', job.id)
  await site.job(job.id, ({ state }) => state === 'paused')

  site.smallFileSystem(small, 64)
  await site.done('job', 'resume', job.id)
  const { status, stdout, stderr } = await follower.ended
  assert.equal(status, STATUS.done, stderr)
  const { details } = JSON.parse(stdout) as { details: { backup: string } }
  await guest.check()
  moment.copy(guest.content)
  await checkRestore(site, repository, details.backup, guest)
  await guest.client.close()
})

test('a stream that fills its file system waits for room, and all data is right after', SKIP, async (t) => {
  const site = await startSite(t)
  const small = site.path('small')
  site.smallFileSystem(small, 14)
  await site.disk('vm1', '32M', 'qcow2', small)
  const guest = new Guest(await site.guest('vm1'))
  await guest.fill(0, 8 * MIB)
  await site.done('snapshot', 'create', 'vm1', 'before')
  await guest.fill(0, MIB)

  const follower = site.begin('stream', 'vm1', '--yes')
  const [job] = await site.running()
  assert.ok(job !== undefined)
  const waiting = await site.job(job.id, ({ state }) => state === 'paused')
  assert.equal(waiting.error?.kind, 'no-space')
  await saysSoon(follower, /waits: .*no space left.*varve job resume stream-/)
  await guest.fill(0, MIB)
  await guest.check()

  site.smallFileSystem(small, 64)
  await site.done('job', 'resume', job.id)
  const { status, stderr } = await follower.ended
  assert.equal(status, STATUS.done, stderr)
  await guest.fill(5 * MIB, 12 * MIB)
  await guest.check()
  await guest.client.close()
  await site.daemon.stop()
  const images = fs.readdirSync(small)
  assert.equal(images.length, 1)
  const image = path.join(small, images[0] ?? '')
  peer('qemu-img', 'check', '-q', '-f', 'qcow2', image)
  const raw = site.path('whole.raw')
  peer('qemu-img', 'convert', '-f', 'qcow2', '-O', 'raw', image, raw)
  guest.checkImage(raw)
})

for (const format of ['raw', 'qcow2'] as const) {
  test(
    `a commit into a full ${format} base waits for room, the guest goes on, and all data is right after`,
    SKIP,
    async (t) => {
      const site = await startSite(t)
      const small = site.path('small')
      site.smallFileSystem(small, 14)
      const image = await site.disk('vm1', '32M', format, small)
      const guest = new Guest(await site.guest('vm1'))
      await guest.fill(0, MIB)
      await site.done('snapshot', 'create', 'vm1', 'before')
      await guest.fill(MIB, 9 * MIB)

      const follower = site.begin('commit', 'vm1', '--yes')
      const [job] = await site.running()
      assert.ok(job !== undefined)
      const waiting = await site.job(job.id, ({ state }) => state === 'paused')
      assert.equal(waiting.error?.kind, 'no-space')
      await saysSoon(follower, /waits: .*no space left.*varve job resume commit-/)
      await guest.fill(MIB, 9 * MIB)
      await guest.check()
      await site.refuses(['disk', 'remove', 'vm1'], STATUS.busy, /in use by job/)
      // Without room it waits again, and says so again.
      await site.done('job', 'resume', job.id)
      await site.job(job.id, ({ state }) => state === 'paused')

      site.smallFileSystem(small, 64)
      await site.done('job', 'resume', job.id)
      const { status, stderr } = await follower.ended
      assert.equal(status, STATUS.done, stderr)
      await guest.fill(5 * MIB, 12 * MIB)
      await guest.check()
      await guest.client.close()
      await site.daemon.stop()
      const raw = site.path('whole.raw')
      peer('qemu-img', 'convert', '-f', format, '-O', 'raw', image, raw)
      guest.checkImage(raw)
      if (format === 'qcow2') peer('qemu-img', 'check', '-q', '-f', 'qcow2', image)
    },
  )

  test(`a commit into a full ${format} base that is cancelled leaves the disk as it is`, SKIP, async (t) => {
    const site = await startSite(t)
    const small = site.path('small')
    site.smallFileSystem(small, 12)
    await site.disk('vm1', '32M', format, small)
    const guest = new Guest(await site.guest('vm1'))
    await site.done('snapshot', 'create', 'vm1', 'before')
    await guest.fill(0, 8 * MIB)
    const { id } = JSON.parse(await site.done('commit', 'vm1', '--yes', '--no-wait', '--json')) as { id: string }
    await site.job(id, ({ state }) => state === 'paused')
    await site.done('job', 'cancel', id)
    const ended = await site.job(id, ({ endedMs }) => endedMs !== undefined)
    assert.equal(ended.error?.kind, 'cancelled')
    await guest.check()
    await guest.client.close()
  })

  test(
    `a guest whose ${format} image fills its file system is told so, and loses nothing that was acknowledged`,
    SKIP,
    async (t) => {
      const site = await startSite(t)
      const small = site.path('small')
      site.smallFileSystem(small, 6)
      const image = await site.disk('vm1', '32M', format, small)
      const guest = new Guest(await site.guest('vm1'))
      await assert.rejects(guest.fill(0, 32 * MIB), (error) => isBlockError(error, 'no-space'))
      const written = guest.content.subarray(0, 32 * MIB).findLastIndex((byte) => byte !== 0)
      assert.ok(written > 2 * MIB, `only ${written} bytes were written`)
      const held = Math.ceil(written / MIB) * MIB
      await checkStart(guest, held)
      await guest.fill(0, MIB)
      await guest.client.close()
      await site.daemon.stop()

      site.smallFileSystem(small, 64)
      await site.daemon.start()
      const again = new Guest(await site.guest('vm1'))
      guest.content.copy(again.content)
      await checkStart(again, held)
      await again.fill(held, 32 * MIB)
      await again.check()
      await again.client.close()
      await site.daemon.stop()
      if (format === 'qcow2') peer('qemu-img', 'check', '-q', '-f', 'qcow2', image)
    },
  )
}

/** Compares the first part of the disk: the rest may hold part of the write that failed. */
async function checkStart(guest: Guest, length: number): Promise<void> {
  const found = Buffer.alloc(MIB)
  for (let offset = 0; offset < length; offset += MIB) {
    await guest.client.read(offset, MIB, found, 0)
    assert.ok(found.equals(guest.content.subarray(offset, offset + MIB)), `the disk differs in the MiB at ${offset}`)
  }
}

test('scratch that is used up breaks the backup, not the guest, and the bits come back', async (t) => {
  const site = await startSite(t, '--scratch', '1M')
  await site.disk('vm1', '32M')
  const guest = new Guest(await site.guest('vm1'))
  await guest.fill(0, 16 * MIB)
  await backUp(site, site.repository)
  await guest.fill(0, 8 * MIB)
  const follower = site.begin('backup', 'vm1', '--repo', site.repository, '--speed', '512K')
  const [job] = await site.running()
  assert.ok(job !== undefined)
  // Its moment has been: what is written from now on is saved first.
  await site.job(job.id, ({ done }) => done > 0)
  await guest.fill(4 * MIB, 12 * MIB)
  checkRefusal(['backup'], await follower.ended, STATUS.failed, /scratch budget of 1048576 bytes is used up/)
  await guest.check()
  const next = await backUp(site, site.repository)
  assert.equal(next.kind, 'incremental')
  await checkRestore(site, site.repository, next.id, guest)
  await guest.client.close()
})

test('a full home refuses new work with one line, the guests go on, and room is all it takes', SKIP, async (t) => {
  const site = Site.make()
  t.after(() => site.end())
  site.smallFileSystem(site.home, 40)
  await site.daemon.start()
  await site.done('repo', 'init', site.repository)
  await site.disk('vm1', '32M')
  const guest = new Guest(await site.guest('vm1'))
  await guest.fill(0, 4 * MIB)
  fillUp(site.home)
  const stateBefore = await site.state()
  const image = site.image('other.qcow2', '8M')
  await site.refuses(['disk', 'add', 'other', image, '-f', 'qcow2'], STATUS.failed, /full|no space left/)
  assert.deepEqual(await site.state(), stateBefore)
  await guest.fill(0, 16 * MIB)
  await guest.check()
  await site.varve('backup', 'vm1', '--repo', site.repository)
  await guest.fill(2 * MIB, 20 * MIB)
  await guest.check()
  fs.rmSync(path.join(site.home, 'ballast'))
  await site.done('disk', 'add', 'other', image, '-f', 'qcow2')
  const next = await backUp(site, site.repository)
  await checkRestore(site, site.repository, next.id, guest)
  await guest.client.close()
})

function fillUp(folder: string): void {
  const file = fs.openSync(path.join(folder, 'ballast'), 'w')
  const piece = Buffer.alloc(4096)
  try {
    for (;;) fs.writeSync(file, piece)
  } catch (error) {
    assert.equal((error as NodeJS.ErrnoException).code, 'ENOSPC')
  } finally {
    fs.closeSync(file)
  }
}
