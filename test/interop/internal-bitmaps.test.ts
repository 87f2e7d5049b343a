// The bitmaps of a disk inside its qcow2 image: made by QEMU and taken over, made here and found by QEMU, marked in use meanwhile, and
// written to by either in turn.

import assert from 'node:assert/strict'
import { test, type TestContext } from 'node:test'
import { assertClean } from '../support/daemon.ts'
import { qemuIo } from '../support/images.ts'
import { missing, peer } from '../support/peer.ts'
import { MIB, Site, STATUS } from '../support/site.ts'
import { dirtyRangesOfQemu } from '../support/storage-daemon.ts'

const skip = missing('qemu-img', 'qemu-io', 'qemu-storage-daemon', 'nbdinfo')

async function start(t: TestContext): Promise<Site> {
  const site = await Site.start()
  t.after(() => site.end())
  return site
}

async function write(site: Site, at: number): Promise<void> {
  const guest = await site.guest('vm1')
  await guest.write(at * MIB, MIB, Buffer.alloc(MIB, 7), 0, 0)
  await guest.close()
}

/** Of each bitmap of the disk: how many MiB it has, and whether it records. */
async function bitmaps(site: Site): Promise<Record<string, [mib: number, recording: boolean]>> {
  const rows = JSON.parse(await site.done('bitmap', 'list', 'vm1', '--json')) as {
    name: string
    dirtyBytes: number
    recording: boolean
  }[]
  return Object.fromEntries(rows.map(({ name, dirtyBytes, recording }) => [name, [dirtyBytes / MIB, recording]]))
}

/** The flags that QEMU sees. */
function flagsIn(image: string): Record<string, string[]> {
  const info = JSON.parse(peer('qemu-img', 'info', '-U', '--output=json', image)) as {
    'format-specific': { data: { bitmaps?: { name: string; flags: string[] }[] } }
  }
  const found = info['format-specific'].data.bitmaps ?? []
  return Object.fromEntries(found.map(({ name, flags }) => [name, flags]))
}

/** Stops the daemon as its operator does. */
async function stop(site: Site): Promise<void> {
  await site.daemon.stop()
}

test('QEMU’s bitmaps are taken over when the image becomes a disk, and found by QEMU with what was written here', {
  skip,
}, async (t) => {
  const site = await start(t)
  const image = site.image('vm1.qcow2', '16M')
  peer('qemu-img', 'bitmap', '--add', '-g', '64k', image, 'daily')
  peer('qemu-img', 'bitmap', '--add', '--disable', image, 'fixed')
  qemuIo(image, 'qcow2', 'write 1M 1M')
  await site.done('disk', 'add', 'vm1', image, '-f', 'qcow2')
  assert.deepEqual(await bitmaps(site), { daily: [1, true], fixed: [0, false] })
  assert.deepEqual(flagsIn(image)['daily'], ['in-use', 'auto'], 'nobody trusts it meanwhile')
  await write(site, 4)
  await site.done('bitmap', 'add', 'vm1', 'ours')
  await write(site, 6)
  await stop(site)
  assert.deepEqual(flagsIn(image), { daily: ['auto'], fixed: [], ours: ['auto'] })
  assert.deepEqual(await dirtyRangesOfQemu(t, image, 'daily'), [
    [MIB, 2 * MIB],
    [4 * MIB, 5 * MIB],
    [6 * MIB, 7 * MIB],
  ])
  assert.deepEqual(await dirtyRangesOfQemu(t, image, 'ours'), [[6 * MIB, 7 * MIB]])
  assertClean(image, 'after the daemon')
})

test('when QEMU wrote last its bitmaps go on, and what it removed is gone; else those of the daemon stay', {
  skip,
}, async (t) => {
  const site = await start(t)
  const image = await site.disk('vm1', '16M')
  await site.done('bitmap', 'add', 'vm1', 'a')
  await site.done('bitmap', 'add', 'vm1', 'b')
  await write(site, 0)
  await stop(site)
  qemuIo(image, 'qcow2', 'write 8M 2M')
  peer('qemu-img', 'bitmap', '--remove', image, 'b')
  await site.daemon.start()
  assert.deepEqual(await bitmaps(site), { a: [3, true] })
  assert.match(site.log(), /took over the bitmaps of .*vm1\.qcow2: a/)
  await write(site, 12)
  await site.daemon.kill()
  await site.daemon.start()
  assert.deepEqual(await bitmaps(site), { a: [4, true] })
  await site.done('bitmap', 'rename', 'vm1', 'a', 'z')
  await stop(site)
  assert.deepEqual(flagsIn(image), { z: ['auto'] })
  await site.daemon.start()
  await site.done('bitmap', 'remove', 'vm1', 'z')
  await stop(site)
  assert.deepEqual(flagsIn(image), {})
  assertClean(image, 'after all')
})

test('a bitmap that was not saved after the last writes is reported, and not used, by either', { skip }, async (t) => {
  const site = await start(t)
  const image = await site.disk('vm1', '16M')
  await site.done('bitmap', 'add', 'vm1', 'a')
  await stop(site)
  await site.daemon.start()
  await write(site, 0)
  await site.daemon.kill()
  assert.deepEqual(flagsIn(image)['a'], ['in-use', 'auto'])
  const copy = site.path('copy.qcow2')
  peer('cp', image, copy)
  await site.daemon.start()
  assert.deepEqual(await bitmaps(site), { a: [1, true] }, 'the dirty log has it all the same')
  await site.done('disk', 'remove', 'vm1')
  await site.done('disk', 'add', 'vm1', copy, '-f', 'qcow2')
  assert.deepEqual(await bitmaps(site), {})
  assert.match(site.log(), /copy\.qcow2 is not used: .*inconsistent/)
})

test('bitmaps stay with a disk over a snapshot, and its clean close saves them in the new active image', {
  skip,
}, async (t) => {
  const site = await start(t)
  const image = await site.disk('vm1', '16M')
  await site.done('bitmap', 'add', 'vm1', 'a')
  await write(site, 0)
  await stop(site)
  await site.daemon.start()
  await site.done('snapshot', 'create', 'vm1', 's')
  await write(site, 2)
  await stop(site)
  assert.deepEqual(flagsIn(image)['a'], ['in-use', 'auto'], 'that of the frozen layer misses what came after it')
  const overlay = site.path('vm1.varve-1.qcow2')
  assert.deepEqual(flagsIn(overlay), { a: ['auto'] })
  assert.deepEqual(await dirtyRangesOfQemu(t, overlay, 'a'), [
    [0, MIB],
    [2 * MIB, 3 * MIB],
  ])
  await site.daemon.start()
  await site.done('commit', 'vm1', '--yes')
  await stop(site)
  assert.deepEqual(await dirtyRangesOfQemu(t, image, 'a'), [
    [0, MIB],
    [2 * MIB, 3 * MIB],
  ])
  assertClean(image, 'after the commit')
})

test('varve bitmap save writes bitmaps now, and says of whom it cannot', { skip }, async (t) => {
  const site = await start(t)
  const image = await site.disk('vm1', '16M')
  await site.refuses(['bitmap', 'save', 'vm1'], STATUS.notFound, /has no bitmap of yours/)
  await site.done('bitmap', 'add', 'vm1', 'a')
  await write(site, 3)
  assert.match(await site.done('bitmap', 'save', 'vm1'), /saved in .*vm1\.qcow2; marked in use until/)
  assert.deepEqual(flagsIn(image), { a: ['in-use', 'auto'] })
  await write(site, 5)
  await site.done('bitmap', 'save', 'vm1', 'a')
  await site.refuses(['bitmap', 'save', 'vm1', 'c'], STATUS.notFound, /no bitmap "c"/)
  await stop(site)
  assert.deepEqual(await dirtyRangesOfQemu(t, image, 'a'), [
    [3 * MIB, 4 * MIB],
    [5 * MIB, 6 * MIB],
  ])
  assertClean(image, 'after the daemon')
  await site.daemon.start()
  await site.disk('plain', '1M', 'raw')
  await site.refuses(['bitmap', 'save', 'plain'], STATUS.failed, /raw image, which has no bitmaps/)
})
