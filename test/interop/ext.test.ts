// File systems that mke2fs made, of every kind and of folders with all that is awkward: each file is read as it is in the folder. And
// what damage makes of them: the right bytes or an error that says so, within the device, and always an end.

import assert from 'node:assert/strict'
import fs from 'node:fs'
import path from 'node:path'
import { before, after, suite, test } from 'node:test'
import os from 'node:os'
import { Random, seedOfRun } from '../../src/base/random.ts'
import type { BlockDevice } from '../../src/block/device.ts'
import { BlockError, isBlockError } from '../../src/block/error.ts'
import { guard } from '../../src/block/guard.ts'
import { MemoryDevice } from '../../src/block/memory.ts'
import { ExtFileSystem } from '../../src/format/ext/ext-file-system.ts'
import type { Inode } from '../../src/format/ext/inode.ts'
import { fileSystemOf } from '../../src/format/file-systems.ts'
import { noise } from '../support/backups.ts'
import { missing, peer } from '../support/peer.ts'

const MIB = 1024 * 1024
const KINDS = [
  { title: 'ext2 with small blocks', options: ['-t', 'ext2', '-b', '1024'] },
  { title: 'ext3', options: ['-t', 'ext3', '-b', '4096'] },
  { title: 'ext4 as it is by default', options: ['-t', 'ext4'] },
  { title: 'ext4 with small blocks and without 64bit', options: ['-t', 'ext4', '-b', '1024', '-O', '^64bit'] },
  { title: 'ext4 with old inodes', options: ['-t', 'ext4', '-I', '128'] },
] as const

let folder: string

before(() => {
  folder = fs.mkdtempSync(path.join(process.env['VARVE_TEST_DIR'] ?? os.tmpdir(), 'varve-ext-'))
  const tree = path.join(folder, 'tree')
  fs.mkdirSync(path.join(tree, 'many'), { recursive: true })
  fs.mkdirSync(path.join(tree, 'a', 'b', 'c'), { recursive: true })
  const put = (name: string, content: Buffer | string): void => fs.writeFileSync(path.join(tree, name), content)
  put('empty', '')
  put('small', 'hello\n')
  put('a/b/c/three blocks', noise(new Random(1), 9000))
  put('large', noise(new Random(2), 3 * MIB + 17))
  for (let i = 0; i < 600; i++) put(`many/file number ${i} with a name that fills directories`, String(i))
  const sparse = fs.openSync(path.join(tree, 'sparse'), 'w')
  // Every other block, so that the map has more than one level.
  for (let at = 0; at < 4 * MIB; at += 16_384) fs.writeSync(sparse, noise(new Random(at), 4096), 0, 4096, at)
  fs.ftruncateSync(sparse, 5 * MIB)
  fs.closeSync(sparse)
  fs.symlinkSync('a/b/c', path.join(tree, 'short'))
  fs.symlinkSync(`${'./'.repeat(50)}a/b/../b/c/three blocks`, path.join(tree, 'long'))
  fs.symlinkSync('/small', path.join(tree, 'a', 'absolute'))
  fs.symlinkSync('round', path.join(tree, 'round'))
  fs.symlinkSync('nowhere', path.join(tree, 'dangling'))
})
after(() => fs.rmSync(folder, { recursive: true, force: true }))

function make(options: readonly string[]): Buffer {
  const image = path.join(folder, 'image')
  fs.rmSync(image, { force: true })
  peer('mke2fs', '-q', '-F', ...options, '-d', path.join(folder, 'tree'), image, '24M')
  return fs.readFileSync(image)
}

function deviceOf(bytes: Uint8Array): BlockDevice {
  const device = new MemoryDevice(bytes.length)
  device.bytes.set(bytes)
  return guard(device)
}

async function content(system: ExtFileSystem, inode: Inode): Promise<Buffer> {
  const bytes = Buffer.alloc(inode.size)
  let position = 0
  for await (const piece of system.read(inode)) {
    assert.equal(piece.offset, position, 'pieces are in order')
    if (piece.bytes !== undefined) bytes.set(piece.bytes, piece.offset)
    position += piece.length
  }
  assert.equal(position, inode.size)
  return bytes
}

/** Compares a directory with a folder of the host, and all below it; returns how many files. */
async function compare(system: ExtFileSystem, at: string): Promise<number> {
  const host = path.join(folder, 'tree', at)
  const entries = await system.list(await system.find(at))
  const names = entries.map(({ name }) => name).filter((name) => name !== 'lost+found')
  assert.deepEqual(names, fs.readdirSync(host).sort())
  let files = 0
  for (const { name, inode } of entries) {
    if (name === 'lost+found') continue
    const file = path.join(host, name)
    const status = fs.lstatSync(file)
    assert.equal(inode.mode, status.mode & 0o7777)
    if (inode.type === 'directory') files += await compare(system, `${at}/${name}`)
    else if (inode.type === 'link') assert.equal(await system.readLink(inode), fs.readlinkSync(file))
    else {
      assert.equal(inode.type, 'file')
      assert.equal(Math.floor(inode.modifiedMs / 1000), Math.floor(status.mtimeMs / 1000))
      assert.ok((await content(system, inode)).equals(fs.readFileSync(file)), file)
      files++
    }
  }
  return files
}

suite('ext file systems', { skip: missing('mke2fs') }, () => {
  for (const { title, options } of KINDS) {
    test(`${title}: every file is read as it is`, async () => {
      const device = deviceOf(make(options))
      assert.equal(await fileSystemOf(device), 'ext')
      const system = await ExtFileSystem.open(device)
      assert.equal(system.needsRecovery, false)
      assert.equal(await compare(system, ''), 605)
    })
  }

  test('paths lead over links, short and long, and back up; circles and what is not there are errors', async () => {
    const system = await ExtFileSystem.open(deviceOf(make(['-t', 'ext4'])))
    const wanted = await system.find('/a/b/c/three blocks')
    for (const way of ['short/three blocks', '/long', 'a/../a/./b//c/three blocks', '../../short/../c/three blocks'])
      assert.equal((await system.find(way)).number, wanted.number, way)
    assert.equal((await system.find('a/absolute')).number, (await system.find('small')).number)
    for (const [way, kind] of [
      ['nothing', 'not-found'],
      ['dangling', 'not-found'],
      ['round', 'corrupt'],
      ['small/er', 'invalid-argument'],
    ] as const) {
      await assert.rejects(system.find(way), (error) => isBlockError(error, kind), way)
    }
  })

  test('holes are not read', async () => {
    const system = await ExtFileSystem.open(deviceOf(make(['-t', 'ext4'])))
    let stored = 0
    for await (const { bytes, length } of system.read(await system.find('sparse'))) stored += bytes ? length : 0
    assert.equal(stored, MIB)
  })

  test('damage is the right bytes or an error within the device, and always an end', async (t) => {
    const random = new Random(seedOfRun())
    t.diagnostic(`VARVE_SEED=${random.seed}`)
    const images = [make(['-t', 'ext2', '-b', '1024']), make(['-t', 'ext4'])].map((bytes) => {
      const device = new MemoryDevice(bytes.length)
      device.bytes.set(bytes)
      return { bytes, device }
    })
    const outcomes = { read: 0, refused: 0 }
    for (let round = 0; round < 60; round++) {
      const { bytes, device } = random.pick(images)
      // Superblock and descriptors, inode tables, and the rest of what describes files, in the first blocks.
      const reach = random.pick([200, 4096, 65_536, MIB, bytes.length - 1024])
      const flips = Array.from({ length: 1 + random.below(6) }, () => 1024 + random.below(reach))
      for (const at of flips) device.bytes[at] = random.pick([0, 1, 0x7f, 0xff, random.below(256)])
      try {
        await walk(await ExtFileSystem.open(guard(device)))
        outcomes.read++
      } catch (error) {
        assert.ok(error instanceof BlockError, String((error as Error).stack))
        assert.notEqual(error.kind, 'out-of-range', error.message)
        outcomes.refused++
      }
      for (const at of flips) device.bytes[at] = bytes[at] as number
    }
    t.diagnostic(JSON.stringify(outcomes))
    assert.ok(outcomes.read > 0 && outcomes.refused > 0)
  })
})

/** Reads all that can be reached, no more of a file than its first pieces: one may say that it is endless. */
async function walk(system: ExtFileSystem): Promise<void> {
  const waiting: Inode[] = [await system.find('/')]
  const seen = new Set<number>()
  for (let inode = waiting.pop(); inode !== undefined; inode = waiting.pop()) {
    if (seen.has(inode.number)) continue
    seen.add(inode.number)
    if (inode.type === 'directory') for (const entry of await system.list(inode)) waiting.push(entry.inode)
    if (inode.type === 'link') await system.readLink(inode)
    if (inode.type !== 'file') continue
    let pieces = 0
    for await (const piece of system.read(inode)) if (piece.length < 0 || ++pieces > 400) break
  }
}
