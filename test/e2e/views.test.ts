// varve view on a real daemon, read by other people's programs alone: a full and an incremental by nbdinfo, nbdcopy and qemu-img, of two
// disks in two threads at one moment; a reader that dies; a daemon that is killed.

import assert from 'node:assert/strict'
import fs from 'node:fs'
import { type TestContext, test } from 'node:test'
import { missing, peer } from '../support/peer.ts'
import { MIB, Site, STATUS } from '../support/site.ts'

const DISKS = ['vm1', 'vm2'] as const
const SIZE = 16 * MIB

interface Opened {
  readonly view: string
  readonly exports: readonly { readonly disk: string; readonly uri: string; readonly kind: string }[]
}

async function setUp(t: TestContext): Promise<Site> {
  const site = await Site.start()
  t.after(() => site.end())
  for (const disk of DISKS) await site.disk(disk, '16M', disk === 'vm1' ? 'qcow2' : 'raw')
  return site
}

async function fill(site: Site, disk: string, value: number, places: readonly number[]): Promise<void> {
  const guest = await site.guest(disk)
  for (const place of places) await guest.write(place, 4096, Buffer.alloc(4096, value), 0, 0)
  await guest.close()
}

async function open(site: Site, ...args: string[]): Promise<Opened> {
  return JSON.parse(await site.done('view', 'open', ...args, '--json')) as Opened
}

async function content(site: Site, disk: string): Promise<Buffer> {
  const guest = await site.guest(disk)
  const found = Buffer.alloc(SIZE)
  await guest.read(0, SIZE, found, 0)
  await guest.close()
  return found
}

/** What the map says is dirty: offset and length of each run. */
function dirtyRuns(uri: string, bitmap: string): [number, number][] {
  const map = JSON.parse(peer('nbdinfo', '--json', `--map=qemu:dirty-bitmap:${bitmap}`, uri)) as {
    offset: number
    length: number
    type: number
  }[]
  return map.filter(({ type }) => type === 1).map(({ offset, length }) => [offset, length])
}

test('nbdcopy takes a full and qemu-img an incremental of two disks at one moment, and both are exact', {
  skip: missing('nbdinfo', 'nbdcopy', 'qemu-img', 'qemu-io'),
}, async (t) => {
  const site = await setUp(t)
  for (const disk of DISKS) await fill(site, disk, 1, [0, 65_536, 5 * MIB, SIZE - 4096])
  const moments = new Map<string, Buffer>()
  for (const disk of DISKS) moments.set(disk, await content(site, disk))
  const full = await open(site, ...DISKS, '--bitmap', 'nightly')
  for (const disk of DISKS) await fill(site, disk, 2, [0, 4096, 9 * MIB])
  for (const { disk, uri, kind } of full.exports) {
    assert.equal(kind, 'full')
    peer('nbdcopy', uri, site.path(`${disk}.full`))
    assert.ok(fs.readFileSync(site.path(`${disk}.full`)).equals(moments.get(disk) as Buffer), `${disk}: the full`)
  }
  await site.done('view', 'complete', full.view)

  for (const disk of DISKS) moments.set(disk, await content(site, disk))
  const increment = await open(site, ...DISKS, '--bitmap', 'nightly')
  for (const disk of DISKS) await fill(site, disk, 3, [0, 12_288, SIZE - 4096])
  for (const { disk, uri, kind } of increment.exports) {
    assert.equal(kind, 'incremental')
    const runs = dirtyRuns(uri, 'nightly')
    assert.deepEqual(runs, [
      [0, 8192],
      [9 * MIB, 4096],
    ])
    const overlay = site.path(`${disk}.increment.qcow2`)
    peer('qemu-img', 'create', '-q', '-f', 'qcow2', '-b', `${disk}.full`, '-F', 'raw', overlay)
    for (const [offset, length] of runs) {
      const piece = site.path('piece')
      // Its count is from the beginning of the source.
      const range = ['bs=4096', `skip=${offset / 4096}`, `count=${(offset + length) / 4096}`]
      peer('qemu-img', 'dd', '-f', 'raw', '-O', 'raw', ...range, `if=${uri}`, `of=${piece}`)
      peer('qemu-io', '-f', 'qcow2', '-c', `write -q -s ${piece} ${offset} ${length}`, overlay)
    }
    peer('qemu-img', 'convert', '-O', 'raw', overlay, site.path(`${disk}.whole`))
    assert.ok(fs.readFileSync(site.path(`${disk}.whole`)).equals(moments.get(disk) as Buffer), `${disk}: the increment`)
  }
  assert.match(await site.done('view', 'list'), /vm1 +incremental +12\.0 KiB/)
  await site.done('view', 'complete', increment.view)
  for (const disk of DISKS) assert.equal((await fs.promises.readdir(site.path('home', 'run', 'nbd'))).length, 2, disk)
})

test('after an abort, a death of the daemon and a reader that is gone the next view has the bits again', {
  skip: missing('nbdinfo'),
}, async (t) => {
  const site = await setUp(t)
  await site.done('bitmap', 'add', 'vm1', 'b')
  await fill(site, 'vm1', 1, [MIB])
  const dirty = async (): Promise<unknown> => {
    const { bitmaps } = await site.daemon.api.call('showDisk', { disk: 'vm1' }, {})
    return bitmaps.map(({ name, dirtyBytes, recording }) => [name, dirtyBytes, recording])
  }
  const aborted = await open(site, 'vm1', '--bitmap', 'b')
  await fill(site, 'vm1', 1, [2 * MIB])
  assert.deepEqual(dirtyRuns(aborted.exports[0]?.uri ?? '', 'b'), [[MIB, 4096]])
  await site.refuses(['view', 'open', 'vm1'], STATUS.busy, /has a view already/)
  await site.done('view', 'abort', aborted.view)
  assert.deepEqual(await dirty(), [['b', 8192, true]])

  const killed = await open(site, 'vm1', '--bitmap', 'b')
  await site.daemon.kill()
  await site.daemon.start()
  assert.deepEqual(await dirty(), [['b', 8192, true]])
  await site.refuses(['view', 'complete', killed.view], STATUS.busy, /has ended/)

  const left = await open(site, 'vm1', '--bitmap', 'b', '--lease', '0.1')
  const ended = await site.job(left.view, ({ endedMs }) => endedMs !== undefined)
  assert.match(ended.error?.message ?? '', /nobody read the view/)
  assert.deepEqual(await dirty(), [['b', 8192, true]])
  await site.refuses(['view', 'complete', 'none'], STATUS.notFound, /no job none/)
})
