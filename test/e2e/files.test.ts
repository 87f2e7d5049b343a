// `varve files` as a user has it: files out of an ext4 partition of a backed-up disk, equal to the originals, with nothing mounted; what is
// no ext is named, with the way to it.

import assert from 'node:assert/strict'
import fs from 'node:fs'
import path from 'node:path'
import zlib from 'node:zlib'
import { after, before, suite, test } from 'node:test'
import { Random } from '../../src/base/random.ts'
import { realHost } from '../../src/host/real.ts'
import { openRepository } from '../../src/repository/repository.ts'
import { DirectoryStore } from '../../src/repository/stores/directory.ts'
import { beginFull, inline, noise } from '../support/backups.ts'
import { missing, peer } from '../support/peer.ts'
import { MIB, Site, STATUS } from '../support/site.ts'

const SECTOR = 512
/** Of the second partition of the disk that sfdisk made, and of the third one. */
const EXT = { start: 10_240 * SECTOR, size: 16_384 * SECTOR }
const SWAP = { start: 30_720 * SECTOR, size: 2048 * SECTOR }

suite('files out of a backup', { skip: missing('mke2fs', 'mkswap') }, () => {
  let site: Site
  let id: string
  const large = noise(new Random(1), MIB + 5)

  /** A disk with partitions, and one that is an ext4 as a whole. */
  before(async () => {
    site = Site.make()
    const tree = site.path('tree')
    fs.mkdirSync(path.join(tree, 'etc'), { recursive: true })
    fs.writeFileSync(path.join(tree, 'etc', 'hostname'), 'vm1\n')
    fs.writeFileSync(path.join(tree, 'large'), large)
    fs.writeFileSync(path.join(tree, 'bell\u0007'), '')
    fs.symlinkSync('etc/hostname', path.join(tree, 'name'))
    peer('mke2fs', '-q', '-t', 'ext4', '-d', tree, site.path('ext4'), `${EXT.size / 1024}k`)
    fs.writeFileSync(site.path('swap'), Buffer.alloc(SWAP.size))
    peer('mkswap', site.path('swap'))
    const golden = path.join(import.meta.dirname, '..', 'golden', 'sfdisk-gpt.raw.zst')
    const disk = zlib.zstdDecompressSync(fs.readFileSync(golden))
    const ext4 = fs.readFileSync(site.path('ext4'))
    disk.set(ext4, EXT.start)
    disk.set(fs.readFileSync(site.path('swap')), SWAP.start)
    await site.done('repo', 'init', site.repository)
    const repository = await openRepository(new DirectoryStore(realHost, site.repository), inline())
    const writer = await beginFull(repository, [
      { name: 'sda', size: disk.length },
      { name: 'sdb', size: ext4.length },
    ])
    await writer.disk(0).write(0, disk.length, disk, 0)
    await writer.disk(1).write(0, ext4.length, ext4, 0)
    id = (await writer.finish()).id
    await repository.close()
  })
  after(() => site.end())

  const files = (...args: string[]): Promise<string> => site.done('files', ...args, '--repo', site.repository)
  const refuses = (status: number, says: RegExp, ...args: string[]): Promise<string> =>
    site.refuses(['files', ...args, '--repo', site.repository], status, says)

  test('partitions are listed with what they hold, and directories with their files', async () => {
    const partitions = await files('list', `${id}:sda`)
    assert.match(partitions, /^2 .* ext .*racine é$/m)
    assert.match(partitions, /^3 .* swap/m)
    const root = await files('list', `${id}:sda:2`, '/')
    assert.match(root, /file +0644 +1048581 .* large$/m)
    assert.match(root, /link .* name -> etc\/hostname$/m)
    assert.match(root, /bell\u{fffd}$/mu)
    const etc = JSON.parse(await files('list', `${id}:sda:2`, 'etc', '--json')) as { name: string; size: number }[]
    assert.deepEqual(
      etc.map(({ name, size }) => [name, size]),
      [['hostname', 4]],
    )
    assert.match(await files('list', `${id}:sdb`), /directory .* etc$/m)
  })

  test('a file comes out as it was, onto standard output and into a new file, over a link and without a partition’s number', async () => {
    assert.equal(await files('get', `${id}:sda`, '/etc/hostname'), 'vm1')
    assert.equal(await files('get', `${id}:sdb`, 'name'), 'vm1')
    const target = site.path('large.copy')
    assert.equal(await files('get', `${id}:sda:2`, 'large', '--to', target), target)
    assert.ok(fs.readFileSync(target).equals(large))
    await refuses(STATUS.busy, /large.copy/, 'get', `${id}:sda:2`, 'large', '--to', target)
  })

  test('what cannot be read is refused in one line that says what to do', async () => {
    await refuses(
      STATUS.failed,
      /partition 3 is swap, which is not read here.*varve export .*:sda .*guestfish --ro/,
      'list',
      `${id}:sda:3`,
    )
    await refuses(STATUS.failed, /partition 1 holds nothing that is known here/, 'list', `${id}:sda:1`)
    await refuses(STATUS.notFound, /no partition 7; it has the partitions 1, 2, 3/, 'list', `${id}:sda:7`)
    await refuses(STATUS.notFound, /there is no \/etc\/passwd/, 'get', `${id}:sda:2`, '/etc/passwd')
    await refuses(STATUS.usage, /etc is a directory, not a file/, 'get', `${id}:sda:2`, 'etc')
    await refuses(STATUS.usage, /name one, as .*:sda/, 'list', id)
    await refuses(STATUS.usage, /BACKUP\[:DISK\[:PARTITION\]\]/, 'list', `${id}:sda:two`)
  })
})
