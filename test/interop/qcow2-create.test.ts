// Images as they are made and resized, beside qemu-img: every option that it has, with its limits; places that are
// preallocated; disks that shrink and grow. QEMU finds each clean, and reads what Varve reads.

import assert from 'node:assert/strict'
import fs from 'node:fs'
import path from 'node:path'
import { suite, test } from 'node:test'
import { Random } from '../../src/base/random.ts'
import { isBlockError } from '../../src/block/error.ts'
import { type CreateOptions, createQcow2 } from '../../src/format/qcow2/create.ts'
import { openQcow2, type Qcow2Image } from '../../src/format/qcow2/image.ts'
import { DATA, UNMAPPED } from '../../src/format/qcow2/mapping.ts'
import { openRaw } from '../../src/format/raw/raw.ts'
import { realHost } from '../../src/host/real.ts'
import { missing, peer, runPeer } from '../support/peer.ts'
import { tempFolder } from '../support/temp.ts'

const KIB = 1024
const MIB = 1024 * KIB

async function open(file: string): Promise<Qcow2Image> {
  const image = await openQcow2(realHost, file, { name: path.basename(file) })
  await image.setAccess('write')
  return image
}

function assertClean(file: string): void {
  const outcome = runPeer('qemu-img', ['check', '-f', 'qcow2', file])
  assert.equal(outcome.status, 0, outcome.stdout + outcome.stderr)
}

/** QEMU looks for a data file where it was started, so that its name has to be whole. */
async function make(file: string, options: CreateOptions): Promise<void> {
  const { dataFile } = options
  const named = dataFile === undefined ? {} : { dataFile: path.join(path.dirname(file), dataFile) }
  await createQcow2(realHost, file, { ...options, ...named })
}

async function contentOf(image: Qcow2Image): Promise<Buffer> {
  const bytes = Buffer.alloc(image.size)
  await image.read(0, bytes.length, bytes, 0)
  return bytes
}

interface Info {
  readonly 'virtual-size': number
  readonly 'cluster-size': number
  readonly 'format-specific': { readonly data: Readonly<Record<string, unknown>> }
}

const MADE: readonly (readonly [name: string, options: Partial<CreateOptions>, data: Record<string, unknown>])[] = [
  ['defaults', {}, { compat: '1.1', 'refcount-bits': 16, 'compression-type': 'zlib', 'extended-l2': false }],
  ['version 2', { version: 2 }, { compat: '0.10', 'refcount-bits': 16 }],
  ...[1, 2, 4, 8, 16, 32, 64].map(
    (bits) => [`refcounts of ${bits} bits`, { refcountBits: bits }, { 'refcount-bits': bits }] as const,
  ),
  ['refcounts of 64 bits, small clusters', { refcountBits: 64, clusterSize: 512 }, { 'refcount-bits': 64 }],
  ['zstd', { compression: 'zstd' }, { 'compression-type': 'zstd' }],
  ['lazy refcounts', { lazyRefcounts: true }, { 'lazy-refcounts': true }],
  ['no lazy refcounts', { lazyRefcounts: false }, { 'lazy-refcounts': false }],
  ['extended L2 entries', { extendedL2: true }, { 'extended-l2': true }],
  ['a data file', { dataFile: 'data' }, { 'data-file': 'data', 'data-file-raw': false }],
  ['a raw data file', { dataFile: 'data', dataFileRaw: true }, { 'data-file-raw': true }],
]

const REFUSED: readonly (readonly [Partial<CreateOptions>, RegExp])[] = [
  [{ clusterSize: 256 }, /512 bytes to 2 MiB/],
  [{ clusterSize: 4 * MIB }, /512 bytes to 2 MiB/],
  [{ clusterSize: 3000 }, /power of two/],
  [{ size: -512 }, /size/],
  [{ size: 2 ** 52, clusterSize: 512 }, /needs clusters of more/],
  [{ refcountBits: 3 }, /refcounts have/],
  [{ refcountBits: 128 }, /refcounts have/],
  [{ version: 2, refcountBits: 8 }, /16 bits/],
  [{ version: 2, lazyRefcounts: true }, /lazy refcounts/],
  [{ version: 2, compression: 'zstd' }, /zlib/],
  [{ version: 2, extendedL2: true }, /extended L2/],
  [{ version: 2, dataFile: 'data' }, /data file/],
  [{ extendedL2: true, clusterSize: 8 * KIB }, /16 KiB/],
  [{ dataFileRaw: true }, /name of a data file/],
  [{ dataFile: 'data', dataFileRaw: true, backing: { name: 'b', format: 'raw' } }, /excludes a backing file/],
  [{ preallocation: 'metadata', backing: { name: 'b', format: 'raw' } }, /preallocated/],
]

suite('images are made', { skip: missing('qemu-img', 'qemu-io') }, () => {
  for (const [name, options, data] of MADE) {
    test(`as QEMU understands them, and used by both: ${name}`, async (t) => {
      const file = path.join(tempFolder(t), 'image.qcow2')
      await make(file, { size: 3 * MIB, ...options })
      assertClean(file)
      const info = JSON.parse(peer('qemu-img', 'info', '--output=json', file)) as Info
      assert.deepEqual([info['virtual-size'], info['cluster-size']], [3 * MIB, options.clusterSize ?? 64 * KIB])
      for (const [key, value] of Object.entries(data)) {
        const found = info['format-specific'].data[key]
        assert.deepEqual(key === 'data-file' ? path.basename(String(found)) : found, value, key)
      }
      const image = await open(file)
      const model = new Random(1).fill(Buffer.alloc(3 * MIB))
      await image.write(0, model.length, model, 0, 0)
      await image.zero(MIB, 200 * KIB, 0)
      model.fill(0, MIB, MIB + 200 * KIB)
      await image.close()
      assertClean(file)
      peer('qemu-io', '-f', 'qcow2', '-c', 'write -P 7 2M 100k', file)
      model.fill(7, 2 * MIB, 2 * MIB + 100 * KIB)
      const again = await open(file)
      assert.ok((await contentOf(again)).equals(model))
      await again.close()
      assertClean(file)
    })
  }

  test('or refused with the reason, and nothing is left behind', async (t) => {
    const folder = tempFolder(t)
    const file = path.join(folder, 'image.qcow2')
    for (const [options, reason] of REFUSED) {
      await assert.rejects(createQcow2(realHost, file, { size: MIB, ...options }), (error) => {
        assert.ok(isBlockError(error, 'invalid-argument'), String(error))
        assert.match(error.message, reason)
        return true
      })
    }
    assert.deepEqual(fs.readdirSync(folder), [])
  })
})

const PREALLOCATED: readonly (readonly [name: string, options: Partial<CreateOptions>])[] = [
  ['clusters of 4 KiB', { clusterSize: 4 * KIB }],
  ['clusters of 64 KiB', {}],
  ['version 2', { version: 2, clusterSize: 4 * KIB }],
  ['extended L2 entries', { extendedL2: true, clusterSize: 16 * KIB }],
  ['a data file', { dataFile: 'data' }],
]

suite('places are preallocated', { skip: missing('qemu-img', 'qemu-io') }, () => {
  const size = 20 * MIB + 512
  for (const [name, options] of PREALLOCATED) {
    for (const preallocation of ['metadata', 'falloc', 'full'] as const) {
      test(`${preallocation}, ${name}`, async (t) => {
        const folder = tempFolder(t)
        const file = path.join(folder, 'image.qcow2')
        await make(file, { size, preallocation, ...options })
        assertClean(file)
        const image = await open(file)
        let placed = 0
        await image.mappings(0, size, (length, kind, host) => {
          assert.ok(host >= 0 && (options.extendedL2 === true ? kind === UNMAPPED : kind === DATA))
          placed += length
          return true
        })
        assert.equal(placed, size)
        assert.ok((await contentOf(image)).equals(Buffer.alloc(size)))
        const holder = options.dataFile === undefined ? file : path.join(folder, options.dataFile)
        const before = fs.statSync(holder)
        const taken = before.blocks * 512
        assert.ok(preallocation === 'metadata' ? taken < size / 4 : taken >= size, `${taken} bytes are taken`)
        await image.write(5 * MIB, MIB, Buffer.alloc(MIB, 5), 0, 0)
        await image.close()
        // What is written has its place already.
        assert.ok(fs.statSync(holder).size <= before.size)
        assertClean(file)
        peer('qemu-io', '-f', 'qcow2', '-c', 'read -P 5 5M 1M', '-c', 'read -P 0 6M 14M', file)
      })
    }
  }

  test('over a backing file, which goes on to show', async (t) => {
    const folder = tempFolder(t)
    const bytes = new Random(3).fill(Buffer.alloc(MIB))
    fs.writeFileSync(path.join(folder, 'base.raw'), bytes)
    const file = path.join(folder, 'image.qcow2')
    const backing = { name: 'base.raw', format: 'raw' }
    await createQcow2(realHost, file, { size: MIB, extendedL2: true, preallocation: 'metadata', backing })
    const image = await open(file)
    image.backing = await openRaw(realHost, path.join(folder, 'base.raw'), { name: 'base' })
    assert.ok((await contentOf(image)).equals(bytes))
    await image.write(10_000, 100, Buffer.alloc(100, 1), 0, 0)
    bytes.fill(1, 10_000, 10_100)
    await image.backing.close()
    await image.close()
    assertClean(file)
    const flat = path.join(folder, 'flat.raw')
    peer('qemu-img', 'convert', '-O', 'raw', file, flat)
    assert.ok(fs.readFileSync(flat).equals(bytes))
  })
})

const RESIZED: readonly (readonly [name: string, options: Partial<CreateOptions>])[] = [
  ['clusters of 512', { clusterSize: 512 }],
  ['clusters of 4 KiB', { clusterSize: 4 * KIB }],
  ['version 2', { version: 2, clusterSize: 4 * KIB }],
  ['extended L2 entries', { extendedL2: true, clusterSize: 16 * KIB }],
  ['a data file', { dataFile: 'data', clusterSize: 4 * KIB }],
  ['preallocated', { preallocation: 'metadata', clusterSize: 4 * KIB }],
]

suite('a disk changes its size', { skip: missing('qemu-img', 'qemu-io') }, () => {
  for (const [name, options] of RESIZED) {
    test(`down and up, many times; what was cut off never comes back: ${name}`, async (t) => {
      const file = path.join(tempFolder(t), 'image.qcow2')
      const random = new Random(11)
      let model: Buffer = Buffer.alloc(9 * MIB)
      random.fill(model)
      await make(file, { size: model.length, ...options })
      let image = await open(file)
      await image.write(0, model.length, model, 0, 0)
      for (let round = 0; round < 8; round++) {
        const size = random.below(20_000) * 512
        await image.resize(size, { shrink: true })
        const resized = Buffer.alloc(size)
        model.copy(resized, 0, 0, Math.min(size, model.length))
        model = resized
        assert.equal(image.size, size)
        assert.ok((await contentOf(image)).equals(model), `round ${round}`)
        if (size > 8 * KIB) {
          const at = random.below(size / 512 - 8) * 512
          await image.write(at, 4 * KIB, Buffer.alloc(4 * KIB, round + 1), 0, 0)
          model.fill(round + 1, at, at + 4 * KIB)
        }
        if (round % 3 !== 2) continue
        await image.close()
        assertClean(file)
        image = await open(file)
      }
      await image.close()
      assertClean(file)
      const flat = path.join(path.dirname(file), 'flat.raw')
      peer('qemu-img', 'convert', '-O', 'raw', file, flat)
      assert.ok(fs.readFileSync(flat).equals(model))
    })
  }

  test('down only when that is meant', async (t) => {
    const file = path.join(tempFolder(t), 'image.qcow2')
    await createQcow2(realHost, file, { size: MIB })
    const image = await open(file)
    for (const smaller of [image.grow(512), image.resize(0)])
      await assert.rejects(smaller, (error) => isBlockError(error, 'invalid-argument'))
    await assert.rejects(image.resize(-1, { shrink: true }), (error) => isBlockError(error, 'invalid-argument'))
    await image.close()
  })

  test('with internal snapshots, which keep theirs; but not in version 2', async (t) => {
    for (const version of [2, 3] as const) {
      const file = path.join(tempFolder(t), 'image.qcow2')
      const bytes = new Random(5).fill(Buffer.alloc(3 * MIB))
      await createQcow2(realHost, file, { size: 3 * MIB, clusterSize: 4 * KIB, version })
      const image = await open(file)
      await image.write(0, bytes.length, bytes, 0, 0)
      await image.createSnapshot('before')
      if (version === 2) {
        for (const size of [MIB, 4 * MIB])
          await assert.rejects(image.resize(size, { shrink: true }), (error) => isBlockError(error, 'unsupported'))
      } else {
        await image.resize(MIB, { shrink: true })
        await image.write(0, MIB, Buffer.alloc(MIB, 1), 0, 0)
        await image.applySnapshot('before')
      }
      assert.ok((await contentOf(image)).equals(bytes))
      await image.deleteSnapshot('before')
      await image.close()
      assertClean(file)
    }
  })

  test('and what is added can be preallocated', async (t) => {
    const file = path.join(tempFolder(t), 'image.qcow2')
    await createQcow2(realHost, file, { size: MIB, clusterSize: 4 * KIB })
    const image = await open(file)
    await image.resize(4 * MIB, { preallocation: 'falloc' })
    const kinds: number[] = []
    await image.mappings(0, 4 * MIB, (length, kind) => kinds.push(kind, length) > 0)
    assert.equal(kinds[0], UNMAPPED)
    assert.equal(kinds[1], MIB)
    assert.ok(kinds.slice(2).every((kind, i) => i % 2 === 1 || kind === DATA))
    await image.close()
    assertClean(file)
  })
})
