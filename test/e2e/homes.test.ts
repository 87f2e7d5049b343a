// Where the daemon lives: homes that cannot be used, that another daemon has, that a kill left, or whose catalog is damaged or of
// another version. And images that changed, went away or may not be written while it was down.

import assert from 'node:assert/strict'
import fs from 'node:fs'
import path from 'node:path'
import { DatabaseSync } from 'node:sqlite'
import { type TestContext, test } from 'node:test'
import { missing, peer } from '../support/peer.ts'
import { beginCommand, checkRefusal, MIB, notRoot, Site, STATUS } from '../support/site.ts'
import { tempFolder } from '../support/temp.ts'

const { failed, usage, busy, corrupt } = STATUS
const NOBODY = 65_534

/** `varve serve` on a home must end by itself, as bad input does. */
async function refusesToServe(home: string, status: number, says: RegExp, user?: number): Promise<void> {
  const args = ['serve', '--home', home]
  checkRefusal(args, await beginCommand(args, user === undefined ? {} : { user }).ended, status, says)
}

async function startSite(t: TestContext): Promise<Site> {
  const site = await Site.start()
  t.after(() => site.end())
  return site
}

test('a home too deep for sockets is refused, and nothing is made of it', async (t) => {
  const folder = tempFolder(t)
  await refusesToServe(path.join(folder, 'x'.repeat(100)), usage, /socket.*(long|bytes)/)
  assert.deepEqual(fs.readdirSync(folder), [])
})

test('a disk name too long for its socket is refused, and the image is not made', async (t) => {
  const site = Site.make()
  t.after(() => site.end())
  const home = path.join(site.folder, 'h'.repeat(107 - site.folder.length - '//run/api.sock'.length - 1))
  const daemon = beginCommand(['serve', '--home', home])
  t.after(() => daemon.child.kill('SIGKILL'))
  while (!daemon.stderr().includes('varve serves')) await new Promise((resolve) => setTimeout(resolve, 20))
  const args = ['disk', 'create', 'd'.repeat(40), site.path('d.raw'), '-f', 'raw', '--size', '1M', '--home', home]
  await site.refuses(args, usage, /socket.*(long|bytes)/)
  assert.equal(fs.existsSync(site.path('d.raw')), false)
})

test('a home in a file, below one, or where nobody can make a folder is refused', async (t) => {
  const file = path.join(tempFolder(t), 'file')
  fs.writeFileSync(file, 'mine')
  await refusesToServe(file, busy, /file.*exists/)
  await refusesToServe(path.join(file, 'home'), busy, /file.*exists/)
  assert.equal(fs.readFileSync(file, 'utf8'), 'mine')
  await refusesToServe('/proc/nothing/home', STATUS.notFound, /\/proc\/nothing: make folder/)
})

test('a home that may not be written is refused', { skip: notRoot }, async (t) => {
  const folder = tempFolder(t)
  fs.chmodSync(folder, 0o755)
  await refusesToServe(path.join(folder, 'home'), failed, /home.*permission denied/, NOBODY)
  assert.deepEqual(fs.readdirSync(folder), [])
})

test('a daemon that was killed leaves sockets and locks that do not hinder the next', async (t) => {
  const site = await startSite(t)
  await site.disk('vm1', '8M')
  await site.daemon.kill()
  assert.ok(fs.existsSync(path.join(site.home, 'run', 'api.sock')))
  assert.ok(fs.existsSync(path.join(site.home, 'run', 'nbd', 'vm1.sock')))
  await site.refuses(['disk', 'list'], STATUS.notFound, /no daemon listens/)
  await site.daemon.start()
  const guest = await site.guest('vm1')
  await guest.write(0, 4096, Buffer.alloc(4096, 1), 0, 0)
  await guest.close()
})

test('a second daemon on a home is refused, and the first one is not disturbed', async (t) => {
  const site = await startSite(t)
  await site.disk('vm1', '8M')
  const guest = await site.guest('vm1')
  await refusesToServe(site.home, busy, /another varve serve has the home .*--home/)
  await guest.write(0, 4096, Buffer.alloc(4096, 1), 0, 0)
  await guest.close()
  await site.done('disk', 'list')
})

test('a catalog that is garbage, or of a newer Varve, is refused and not touched', async (t) => {
  const site = await startSite(t)
  await site.disk('vm1', '8M')
  await site.daemon.stop()
  const catalog = path.join(site.home, 'catalog.db')
  const whole = fs.readFileSync(catalog)

  const garbage = Buffer.alloc(8192, 'garbage ')
  fs.writeFileSync(catalog, garbage)
  await refusesToServe(site.home, corrupt, /catalog\.db.*move it away/)
  assert.ok(fs.readFileSync(catalog).equals(garbage))

  fs.writeFileSync(catalog, whole)
  changeCatalog(catalog, 'PRAGMA user_version = 99')
  await refusesToServe(site.home, corrupt, /catalog\.db was written by a newer Varve \(catalog version 99/)
  const database = new DatabaseSync(catalog, { readOnly: true })
  assert.equal(database.prepare('PRAGMA user_version').get()?.['user_version'], 99)
  database.close()

  fs.writeFileSync(catalog, whole)
  changeCatalog(catalog, `UPDATE records SET body = '{"half' WHERE kind = 'disk'`)
  await refusesToServe(site.home, corrupt, /catalog\.db.*move it away/)

  fs.writeFileSync(catalog, whole)
  await site.daemon.start()
  assert.match(await site.done('disk', 'list'), /vm1 +open/)
})

function changeCatalog(catalog: string, statement: string): void {
  const database = new DatabaseSync(catalog)
  database.exec(statement)
  database.close()
}

test('a disk whose image went away is shown failed with the reason, the others serve, and a restart brings it back', async (t) => {
  const site = await startSite(t)
  const image = await site.disk('vm1', '8M')
  await site.disk('vm2', '8M')
  await site.daemon.stop()
  fs.renameSync(image, `${image}.away`)
  await site.daemon.start()
  const listed = await site.done('disk', 'list')
  assert.match(listed, /vm1 +failed .*vm1\.qcow2 does not exist/)
  assert.match(listed, /vm2 +open .*nbd\+unix/)
  await site.refuses(
    ['backup', 'vm1', '--repo', site.repository],
    STATUS.notFound,
    /disk vm1 is not open: .*does not exist/,
  )
  await site.refuses(['snapshot', 'create', 'vm1'], STATUS.notFound, /disk vm1 is not open/)
  await site.done('backup', 'vm2', '--repo', site.repository)
  await site.daemon.stop()
  fs.renameSync(`${image}.away`, image)
  await site.daemon.start()
  assert.match(await site.done('disk', 'list'), /vm1 +open/)
})

test('a disk that cannot be opened can be removed, with the commit that waited for it', async (t) => {
  const site = await startSite(t)
  const image = await site.disk('vm1', '8M')
  await site.done('snapshot', 'create', 'vm1', 's')
  const guest = await site.guest('vm1')
  await guest.write(0, MIB, Buffer.alloc(MIB, 1), 0, 0)
  await guest.close()
  await site.done('commit', 'vm1', '--yes', '--no-wait', '--speed', '1K')
  await site.daemon.stop()
  fs.renameSync(image, `${image}.away`)
  await site.daemon.start()
  assert.match(site.log(), /job commit-\w+ cannot go on now/)
  await site.done('disk', 'remove', 'vm1')
  assert.equal(JSON.parse(await site.done('disk', 'list', '--json')).length, 0)
  await site.daemon.stop()
  const before = site.log().length
  await site.daemon.start()
  assert.doesNotMatch(site.log().slice(before), /cannot go on/)
  assert.ok(fs.existsSync(site.path('vm1.varve-1.qcow2')), 'images stay')
})

test('an image that another program changed while the daemon was down is a full at the next backup, which says why', {
  skip: missing('qemu-io'),
}, async (t) => {
  const site = await startSite(t)
  const image = await site.disk('vm1', '8M')
  const backup = ['backup', 'vm1', '--repo', site.repository]
  assert.match(await site.done(...backup), /full \(no earlier backup/)
  assert.match(await site.done(...backup), /incremental/)
  await site.daemon.stop()
  await site.daemon.start()
  assert.match(await site.done(...backup), /incremental/)
  await site.daemon.stop()
  peer('qemu-io', '-f', 'qcow2', '-c', 'write -P 9 1M 64k', image)
  await site.daemon.start()
  // Once more: the reason outlives the start that found it.
  await site.daemon.stop()
  await site.daemon.start()
  const said = await site.done(...backup)
  assert.match(
    said,
    /full by comparison with \S+ \(another program changed .*vm1\.qcow2 while the daemon did not run\)/,
  )
  await site.done('restore', said.split('\n')[0] ?? '', '--repo', site.repository, '--to', site.path('r.raw'))
  assert.ok(
    fs
      .readFileSync(site.path('r.raw'))
      .subarray(MIB, MIB + 65_536)
      .equals(Buffer.alloc(65_536, 9)),
  )
  assert.match(await site.done(...backup), /incremental/)
})

test('a data file that another program changed while the daemon was down makes the next backup a full', {
  skip: missing('qemu-img'),
}, async (t) => {
  const site = await startSite(t)
  const data = site.path('vm1.data')
  const image = site.image('vm1.qcow2', '8M', '-o', `data_file=${data},data_file_raw=on`)
  await site.done('disk', 'add', 'vm1', image, '-f', 'qcow2')
  const backup = ['backup', 'vm1', '--repo', site.repository]
  assert.match(await site.done(...backup), /full \(no earlier backup/)
  assert.match(await site.done(...backup), /incremental/)
  await site.daemon.stop()
  const fd = fs.openSync(data, 'r+')
  fs.writeSync(fd, Buffer.alloc(65_536, 9), 0, 65_536, MIB)
  fs.closeSync(fd)
  await site.daemon.start()
  const said = await site.done(...backup)
  assert.match(
    said,
    /full by comparison with \S+ \(another program changed .*vm1\.qcow2 while the daemon did not run\)/,
  )
  await site.done('restore', said.split('\n')[0] ?? '', '--repo', site.repository, '--to', site.path('r.raw'))
  const restored = fs.readFileSync(site.path('r.raw')).subarray(MIB, MIB + 65_536)
  assert.ok(restored.equals(Buffer.alloc(65_536, 9)))
})

test('a chain that another program changed while the daemon was down is refused, with the way on', {
  skip: missing('qemu-img'),
}, async (t) => {
  const site = await startSite(t)
  const image = await site.disk('vm1', '8M')
  await site.done('snapshot', 'create', 'vm1', 's')
  await site.daemon.stop()
  peer('qemu-img', 'commit', '-q', '-f', 'qcow2', '-b', image, site.path('vm1.varve-1.qcow2'))
  peer('qemu-img', 'rebase', '-u', '-f', 'qcow2', '-b', '', site.path('vm1.varve-1.qcow2'))
  await site.daemon.start()
  assert.match(await site.done('disk', 'list'), /vm1 +failed .*another program changed it.*varve disk remove vm1/)
})

test('a lost dirty log makes the next backup a full, which says why', async (t) => {
  const site = await startSite(t)
  await site.disk('vm1', '8M')
  const backup = ['backup', 'vm1', '--repo', site.repository]
  await site.done(...backup)
  await site.daemon.stop()
  const folder = path.join(site.home, 'disks', fs.readdirSync(path.join(site.home, 'disks'))[0] ?? '')
  for (const name of ['slot.0', 'slot.1']) fs.writeFileSync(path.join(folder, name), Buffer.alloc(4096, 'garbage '))
  await site.daemon.start()
  assert.match(await site.done(...backup), /full by comparison with \S+ \(its dirty log was damaged/)
  await site.daemon.stop()
  fs.rmSync(folder, { recursive: true })
  await site.daemon.start()
  assert.match(await site.done(...backup), /full by comparison with \S+ \(the dirty log in .* is gone\)/)
})

test('an image or a folder that the daemon’s user may not use is refused with the reason', {
  skip: notRoot,
}, async (t) => {
  const site = Site.make({ user: NOBODY })
  t.after(() => site.end())
  fs.chownSync(site.folder, NOBODY, NOBODY)
  await site.daemon.start()
  const image = site.image('readable.qcow2', '8M')
  fs.chmodSync(image, 0o444)
  await site.refuses(['disk', 'add', 'd', image, '-f', 'qcow2'], failed, /readable\.qcow2.*(may not|cannot) be written/)
  fs.chmodSync(image, 0o000)
  await site.refuses(['disk', 'add', 'd', image, '-f', 'qcow2'], failed, /readable\.qcow2.*permission denied/)
  fs.mkdirSync(site.path('closed'), { mode: 0o700 })
  const hidden = site.image('closed/hidden.qcow2', '8M')
  fs.chmodSync(hidden, 0o666)
  await site.refuses(['disk', 'add', 'd', hidden, '-f', 'qcow2'], failed, /hidden\.qcow2.*permission denied/)
  await site.refuses(
    ['disk', 'create', 'd', site.path('closed/d'), '-f', 'raw', '--size', '1M'],
    failed,
    /permission denied/,
  )
  // The folder may be read and not written: the disk is served, a snapshot is not made, and the guest does not notice.
  fs.chmodSync(site.path('closed'), 0o755)
  await site.done('disk', 'add', 'd', hidden, '-f', 'qcow2')
  await site.refuses(['snapshot', 'create', 'd', 's'], failed, /permission denied/)
  const guest = await site.guest('d')
  await guest.write(0, 4096, Buffer.alloc(4096, 1), 0, 0)
  await guest.close()
  assert.match(await site.done('snapshot', 'list', 'd'), /^NAME[^\n]*$/)
  const repository = ['backup', 'd', '--repo', site.path('closed', 'repository')]
  await site.done('repo', 'init', site.path('closed', 'repository'))
  await site.refuses(repository, failed, /permission denied/)
  assert.equal(JSON.parse(await site.done('disk', 'list', '--json')).length, 1)
})
