// `varve restore --live` with the real daemon, killed again and again while a guest writes and the disk is brought: no acknowledged write
// is lost, and what comes of it is what a plain restore makes, with the guest's writes.

import assert from 'node:assert/strict'
import fs from 'node:fs'
import { after, before, test } from 'node:test'
import { Random, seedOfRun } from '../../src/base/random.ts'
import { noise } from '../support/backups.ts'
import { missing, peer, runPeer } from '../support/peer.ts'
import { MIB, Site, STATUS } from '../support/site.ts'

const SIZE = 48 * MIB
const KILLS = 3

let site: Site
let id: string
let plain: Buffer

before(async () => {
  site = await Site.start()
  await site.disk('vm1', '48M')
  const guest = await site.guest('vm1')
  for (const at of [0, 5, 20, 21, 22, 40]) await guest.write(at * MIB, MIB, noise(new Random(at), MIB), 0, 0)
  await guest.close()
  const said = JSON.parse(await site.done('backup', 'vm1', '--repo', site.repository, '--json')) as {
    details: { backup: string }
  }
  id = said.details.backup
  await site.done('restore', id, '--repo', site.repository, '--to', site.path('plain.raw'))
  plain = fs.readFileSync(site.path('plain.raw'))
})
after(() => site.end())

test('a live restore survives kills of the daemon, and ends as an image that equals a plain restore with what was written', {
  skip: missing('qemu-img'),
}, async (t) => {
  const random = new Random(seedOfRun())
  t.diagnostic(`VARVE_SEED=${random.seed}`)
  const expected = Buffer.from(plain)
  const image = site.path('vm2.qcow2')
  const line = ['restore', id, '--repo', site.repository, '--live', 'vm2', '--to', image]
  const uri = await site.done(...line, '--speed', '16K', '--no-wait')
  assert.match(uri, /^nbd\+unix:/)
  const [job] = await site.running()
  assert.equal(job?.kind, 'restore')
  for (let kill = 0; kill < KILLS; kill++) {
    const guest = await site.guest('vm2')
    for (let write = 0; write < 20; write++) {
      const offset = random.below(SIZE / 4096) * 4096
      const data = noise(random, 4096)
      await guest.write(offset, 4096, data, 0, 0)
      data.copy(expected, offset)
      const into = Buffer.alloc(20_000)
      const at = random.below(SIZE - into.length)
      await guest.read(at, into.length, into, 0)
      assert.ok(into.equals(expected.subarray(at, at + into.length)), `VARVE_SEED=${random.seed}: at ${at}`)
    }
    await site.daemon.kill()
    await guest.close().catch(() => undefined)
    // Nobody takes the image for the disk while the rest of it is in the repository.
    assert.match(runPeer('qemu-img', ['map', '-f', 'qcow2', image]).stderr, /varve-backup/)
    await site.daemon.start()
  }
  const shown = JSON.parse(await site.done('disk', 'show', 'vm2', '--json')) as { restoring?: { backup: string } }
  assert.equal(shown.restoring?.backup, id)
  assert.match(await site.done('disk', 'show', 'vm2'), new RegExp(`restoring: from ${site.repository}, ${id}:vm1`))
  await site.daemon.api.call('setJobSpeed', { job: job.id }, { speed: 0 })
  await site.job(job.id, ({ endedMs }) => endedMs !== undefined)
  const next = JSON.parse(await site.done('backup', 'vm2', '--repo', site.repository, '--json')) as {
    details: { disks: { kind: string; reason: string }[] }
  }
  assert.deepEqual(next.details.disks, [{ name: 'vm2', kind: 'incremental', reason: `changes since ${id}` }])
  await site.done('disk', 'remove', 'vm2')
  fs.writeFileSync(site.path('expected.raw'), expected)
  peer('qemu-img', 'compare', '-f', 'qcow2', '-F', 'raw', image, site.path('expected.raw'))
})

test('a restore onto a disk hangs up on its guest, writes what differs, and serves it again; what it was is a snapshot', async () => {
  const line = ['restore', id, '--repo', site.repository, '--onto', 'vm1']
  const guest = await site.guest('vm1')
  await guest.write(30 * MIB, 8192, Buffer.alloc(8192, 1), 0, 0)
  await site.refuses(line, STATUS.usage, /withdrawn from its guests until it is what it was in .*: say --yes to go on/)
  const said = await site.done(...line, '--yes')
  assert.match(said, /^vm1: what changed since .*\ncompared 8\.00 KiB, fetched 0 B, wrote 8\.00 KiB$/)
  await assert.rejects(async () => guest.read(0, 4096, Buffer.alloc(4096), 0))
  await guest.close().catch(() => undefined)
  const again = await site.guest('vm1')
  const found = Buffer.alloc(SIZE)
  for (let at = 0; at < SIZE; at += MIB) await again.read(at, MIB, found, at)
  await again.close()
  assert.ok(found.equals(plain))
  assert.match(await site.done('snapshot', 'list', 'vm1'), new RegExp(`before-${id}`))
  await site.refuses([...line, '--yes'], STATUS.busy, /has a snapshot before-.* already/)
  await site.refuses([...line, '--yes', '--discard', '--keep', 'x'], STATUS.usage, /--keep or --discard/)
  await site.refuses([...line, '--yes', '--to', 'x'], STATUS.usage, /one of --to, --live and --onto/)
  await site.done(...line, '--yes', '--discard')
})

test('a live restore that cannot be is refused in one line', async () => {
  const refuses = (status: number, says: RegExp, ...args: string[]): Promise<string> =>
    site.refuses(['restore', ...args, '--repo', site.repository], status, says)
  await refuses(STATUS.usage, /--to IMAGE, --live NAME for a new disk at once, or --onto DISK/, id)
  await refuses(STATUS.usage, /a raw one cannot say/, id, '--live', 'vm3', '-f', 'raw')
  await refuses(STATUS.usage, /--salvage needs --to/, id, '--live', 'vm3', '--salvage')
  await refuses(STATUS.busy, /there is a disk vm1 already/, id, '--live', 'vm1')
  await refuses(STATUS.notFound, /has no backup/, 'yesterday', '--live', 'vm3')
  await refuses(STATUS.notFound, /has no disk sda; it has vm1/, `${id}:sda`, '--live', 'vm3')
  await refuses(STATUS.busy, /plain.raw is there already/, id, '--live', 'vm3', '--to', site.path('plain.raw'))
})
