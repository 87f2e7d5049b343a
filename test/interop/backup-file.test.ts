// varve backup --to-file: the files are images like any others, a chain by their backing files, which qemu-img alone checks, reads,
// commits and restores. What was changed since is none to go on from.

import assert from 'node:assert/strict'
import fs from 'node:fs'
import { type TestContext, test } from 'node:test'
import { Random } from '../../src/base/random.ts'
import { missing, peer } from '../support/peer.ts'
import { MIB, Site, STATUS } from '../support/site.ts'

const SIZE = 24 * MIB
const SKIP = { skip: missing('qemu-img', 'qemu-io') }

class Trial {
  readonly site: Site
  readonly random = new Random(11)

  private constructor(site: Site) {
    this.site = site
  }

  static async start(t: TestContext): Promise<Trial> {
    const site = await Site.start()
    t.after(() => site.end())
    await site.disk('vm1', String(SIZE))
    fs.mkdirSync(site.path('files'))
    return new Trial(site)
  }

  file(name: string): string {
    return this.site.path('files', name)
  }

  async write(...places: readonly (readonly [offset: number, length: number])[]): Promise<void> {
    const guest = await this.site.guest('vm1')
    for (const [offset, length] of places)
      await guest.write(offset, length, this.random.fill(Buffer.alloc(length)), 0, 0)
    await guest.close()
  }

  async content(): Promise<Buffer> {
    const guest = await this.site.guest('vm1')
    const found = Buffer.alloc(guest.size)
    for (let at = 0; at < found.length; at += MIB) await guest.read(at, Math.min(MIB, found.length - at), found, at)
    await guest.close()
    return found
  }

  /** Backs up and checks the file by qemu-img alone; returns what was said. */
  async backUp(name: string, ...args: string[]): Promise<string> {
    const content = await this.content()
    const said = await this.site.done('backup', 'vm1', '--to-file', this.file(name), ...args)
    const format = args.includes('raw') ? 'raw' : 'qcow2'
    if (format === 'qcow2') peer('qemu-img', 'check', '-q', '-f', 'qcow2', this.file(name))
    this.shows(name, format, content)
    return said
  }

  shows(name: string, format: string, content: Buffer): void {
    const raw = this.site.path('restored.raw')
    peer('qemu-img', 'convert', '-f', format, '-O', 'raw', this.file(name), raw)
    assert.ok(fs.readFileSync(raw).equals(content), `${name} shows the disk`)
  }

  async dirtyBytes(): Promise<number | undefined> {
    const { bitmaps } = await this.site.daemon.api.call('showDisk', { disk: 'vm1' }, {})
    return bitmaps.find(({ name }) => name.startsWith('backup:file:'))?.dirtyBytes
  }
}

test(
  'a full and incrementals are a chain that qemu-img checks and restores, each as of its moment',
  SKIP,
  async (t) => {
    const trial = await Trial.start(t)
    await trial.write([0, 2 * MIB], [9 * MIB, MIB], [SIZE - 4096, 4096])
    assert.match(await trial.backUp('monday.qcow2'), /vm1: full \(there was no bitmap/)
    const monday = await trial.content()
    await trial.write([4096, 4096], [9 * MIB + 512, 1024], [15 * MIB, 70_000])
    const guest = await trial.site.guest('vm1')
    await guest.zero(MIB, 100_000, 0)
    await guest.close()
    const said = await trial.backUp('tuesday.qcow2')
    assert.match(said, /vm1: incremental \(changes since monday\.qcow2\)\nread \d/)
    assert.ok(fs.statSync(trial.file('tuesday.qcow2')).blocks * 512 < 2 * MIB)
    const tuesday = await trial.content()
    await trial.site.done('disk', 'resize', 'vm1', String(SIZE + MIB))
    await trial.write([SIZE + 8192, 4096])
    await trial.backUp('wednesday.qcow2')
    const info = peer('qemu-img', 'info', '--backing-chain', '--output=json', trial.file('wednesday.qcow2'))
    const chain = JSON.parse(info) as { 'backing-filename'?: string; 'backing-filename-format'?: string }[]
    assert.deepEqual(
      chain.map((one) => [one['backing-filename'], one['backing-filename-format']]),
      [
        ['tuesday.qcow2', 'qcow2'],
        ['monday.qcow2', 'qcow2'],
        [undefined, undefined],
      ],
    )
    trial.shows('monday.qcow2', 'qcow2', monday)
    trial.shows('tuesday.qcow2', 'qcow2', tuesday)
    assert.equal(await trial.dirtyBytes(), 0)
    assert.deepEqual(fs.readdirSync(trial.site.path('files')).sort(), [
      'monday.qcow2',
      'tuesday.qcow2',
      'wednesday.qcow2',
    ])
  },
)

test('a file can hold what changed since a checkpoint, and lies over that file then', SKIP, async (t) => {
  const trial = await Trial.start(t)
  await trial.write([0, 2 * MIB])
  await trial.backUp('monday.qcow2', '--checkpoint', 'monday')
  await trial.write([4 * MIB, 4096])
  await trial.backUp('tuesday.qcow2')
  await trial.write([6 * MIB, 4096])
  const said = await trial.backUp('wednesday.qcow2', '--since', 'monday')
  assert.match(said, /vm1: incremental \(changes since monday\.qcow2\)/)
  await trial.write([8 * MIB, 4096])
  assert.match(await trial.backUp('thursday.qcow2'), /vm1: incremental \(changes since wednesday\.qcow2\)/)
  fs.rmSync(trial.file('monday.qcow2'))
  await trial.site.done('backup', 'vm1', '--to-file', trial.file('friday.qcow2'), '--full')
  await trial.write([9 * MIB, 4096])
  const usual = await trial.backUp('saturday.qcow2', '--since', 'monday')
  assert.match(
    usual,
    /incremental \(changes since friday\.qcow2; not since monday: the earlier backup monday\.qcow2 is no longer in/,
  )
})

test(
  'a raw full has incrementals over it; a file that was changed or is gone makes a full, which says so',
  SKIP,
  async (t) => {
    const trial = await Trial.start(t)
    await trial.write([0, MIB])
    assert.match(await trial.backUp('base.raw', '-f', 'raw'), /full \(a raw image has no backing file\)/)
    await trial.write([MIB, 4096])
    assert.match(await trial.backUp('one.qcow2'), /incremental \(changes since base\.raw\)/)
    peer('qemu-io', '-f', 'qcow2', '-c', 'write -q 0 4096', trial.file('one.qcow2'))
    await trial.write([2 * MIB, 4096])
    assert.match(await trial.backUp('two.qcow2'), /full \(one\.qcow2 was changed or replaced since it was made\)/)
    fs.rmSync(trial.file('two.qcow2'))
    assert.match(await trial.backUp('three.qcow2'), /full \(the earlier backup two\.qcow2 is no longer in/)
    assert.match(await trial.backUp('four.qcow2', '--full'), /full \(asked for\)/)
    assert.match(await trial.backUp('five.qcow2'), /incremental \(changes since four\.qcow2\)/)
  },
)

test(
  'a file that is there, several disks, and what goes with a repository are refused, and change nothing',
  SKIP,
  async (t) => {
    const trial = await Trial.start(t)
    const { site } = trial
    await site.disk('vm2', '1M')
    await trial.write([0, 4096])
    await trial.backUp('a.qcow2')
    await trial.write([0, 8192])
    const dirty = await trial.dirtyBytes()
    const before = await site.state()
    const file = trial.file('a.qcow2')
    const to = ['--to-file', trial.file('b.qcow2')]
    for (const [args, status, says] of [
      [['vm1', '--to-file', file], STATUS.busy, /is there already: each backup is a file/],
      [['vm1', ...to, '--with', 'vm2'], STATUS.usage, /a file holds one disk/],
      [['vm1', ...to, '--repo', site.repository], STATUS.usage, /either --repo or --to-file/],
      [['vm1', ...to, '--prove', '5%'], STATUS.usage, /--prove compares with a backup/],
      [['vm1', ...to, '--no-wait'], STATUS.usage, /ends with it/],
      [['vm1', ...to, '--on-error', 'stop'], STATUS.usage, /report or ignore/],
      [['vm1', '--to-file', site.path('none', 'b.qcow2')], STATUS.notFound, /none/],
      [['none', ...to], STATUS.notFound, /there is no machine or disk none/],
      [['vm1'], STATUS.usage, /say where to/],
    ] as const)
      await site.refuses(['backup', ...args], status, says)
    assert.deepEqual(await site.state(), before)
    assert.equal(await trial.dirtyBytes(), dirty)
  },
)

test('a file that cannot be finished leaves nothing of itself, and the bits are back', {
  skip: SKIP.skip || (process.getuid?.() === 0 ? false : 'it takes root'),
}, async (t) => {
  const trial = await Trial.start(t)
  const small = trial.site.path('files', 'small')
  trial.site.smallFileSystem(small, 2)
  await trial.write([0, MIB])
  await trial.backUp('small/one.qcow2')
  await trial.write([4 * MIB, 8 * MIB])
  const dirty = await trial.dirtyBytes()
  await trial.site.refuses(
    ['backup', 'vm1', '--to-file', trial.file('small/two.qcow2')],
    STATUS.failed,
    /no space left/,
  )
  assert.deepEqual(fs.readdirSync(small), ['one.qcow2'])
  assert.equal(await trial.dirtyBytes(), dirty)
  trial.site.smallFileSystem(small, 32)
  assert.match(await trial.backUp('small/two.qcow2'), /incremental \(changes since one\.qcow2\)/)
})
