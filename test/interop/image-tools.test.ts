// What `varve image` says of images that qemu-img made, beside what qemu-img says: info, map, check and measure print the same JSON.
// Where a value differs on purpose, the table has the reason.

import assert from 'node:assert/strict'
import fs from 'node:fs'
import path from 'node:path'
import { type TestContext, suite, test } from 'node:test'
import { missing, peer, runPeer } from '../support/peer.ts'
import { beginCommand } from '../support/site.ts'
import { tempFolder } from '../support/temp.ts'

const SKIP = { skip: missing('qemu-img', 'qemu-io') }

interface Folder {
  path(name: string): string
  /** qemu-img create. */
  create(name: string, size: string, ...options: string[]): void
  /** qemu-io, with these commands. */
  io(name: string, ...commands: string[]): void
  qemuImg(...args: string[]): void
}

interface Subject {
  readonly what: string
  /** Makes the image `image.qcow2` or `image.raw`. */
  readonly make: (folder: Folder) => void
  readonly format?: 'raw'
  /** The image file keeps its holes. Else it has none, so that QEMU does not take it for a preallocated one. */
  readonly isSparse?: boolean
  /** What differs in the JSON of a tool, one field or 'all', and why. */
  readonly differs?: readonly { readonly tool: Tool; readonly field: string; readonly why: string }[]
}

type Tool = 'info' | 'chain' | 'map' | 'check' | 'measure'

const IMAGE = 'image.qcow2'

/** An image with those options, some data, zeros, and a hole that was data. */
const written =
  (options: readonly string[], size = '6M') =>
  (folder: Folder): void => {
    folder.create(IMAGE, size, ...options)
    folder.io(
      IMAGE,
      'write -P 1 100k 300k',
      'write -z 1M 200k',
      'write -P 2 3M 70k',
      'write -z -u 3M 128k',
      'discard 200k 64k',
    )
  }

const option = (...settings: string[]): string[] => settings.flatMap((setting) => ['-o', setting])

const SUBJECTS: readonly Subject[] = [
  { what: 'empty', make: (folder) => folder.create(IMAGE, '10M') },
  {
    what: 'of no size',
    make: (folder) => folder.create(IMAGE, '0'),
    differs: [{ tool: 'map', field: 'all', why: 'QEMU prints one entry of no length; Varve prints none' }],
  },
  { what: 'written', make: written([]) },
  { what: 'of version 2', make: written(option('compat=0.10')) },
  { what: 'with clusters of 512 bytes', make: written(option('cluster_size=512')) },
  { what: 'with clusters of 2 MiB', make: written(option('cluster_size=2M')) },
  { what: 'with refcounts of 1 bit', make: written(option('refcount_bits=1')) },
  { what: 'with refcounts of 64 bits', make: written(option('refcount_bits=64')) },
  { what: 'with lazy refcounts', make: written(option('lazy_refcounts=on')) },
  { what: 'with zstd', make: written(option('compression_type=zstd')) },
  { what: 'with extended L2 entries', make: written(option('extended_l2=on,cluster_size=128k')) },
  {
    what: 'over an image with a data file',
    make: (folder) => {
      folder.create('base.qcow2', '3M', '-o', `data_file=${folder.path('base.data')}`)
      folder.io('base.qcow2', 'write -P 3 1M 100k')
      written(['-b', 'base.qcow2', '-F', 'qcow2'])(folder)
    },
  },
  {
    what: 'over a raw backing file that is shorter',
    make: (folder) => {
      folder.create('base.raw', '3M')
      folder.io('base.raw', 'write -P 3 1M 100k')
      written(['-b', 'base.raw', '-F', 'raw'])(folder)
    },
  },
  {
    what: 'over three backing files, the second of them short',
    make: (folder) => {
      folder.create('base.qcow2', '6M')
      folder.io('base.qcow2', 'write -P 3 1M 2M', 'write -P 4 5M 1M')
      folder.create('middle.qcow2', '5M', '-b', 'base.qcow2', '-F', 'qcow2')
      folder.io('middle.qcow2', 'write -z 2M 64k')
      folder.create('upper.qcow2', '6M', '-b', folder.path('middle.qcow2'), '-F', 'qcow2')
      written(['-b', 'upper.qcow2', '-F', 'qcow2'])(folder)
    },
  },
  {
    what: 'marked as not closed',
    make: (folder) => {
      written(option('lazy_refcounts=on'))(folder)
      setByte(folder.path(IMAGE), 79, 1)
    },
  },
  {
    what: 'marked corrupt',
    make: (folder) => {
      written([])(folder)
      setByte(folder.path(IMAGE), 79, 2)
    },
  },
  { what: 'with a data file', make: (folder) => written(option(`data_file=${folder.path('data.raw')}`))(folder) },
  {
    what: 'with a raw data file',
    make: (folder) => written(option(`data_file=${folder.path('data.raw')},data_file_raw=on`))(folder),
    differs: [{ tool: 'measure', field: 'required', why: 'Varve leaves out the holes of the data file' }],
  },
  {
    what: 'with compressed clusters',
    make: (folder) => {
      folder.create('source.raw', '4M')
      folder.io('source.raw', 'write -P 5 0 1M', 'write -P 6 2M 100k')
      folder.qemuImg('convert', '-f', 'raw', '-O', 'qcow2', '-c', folder.path('source.raw'), folder.path(IMAGE))
      folder.io(IMAGE, 'write -P 7 3M 64k')
    },
  },
  {
    what: 'with leaked clusters',
    make: (folder) => {
      written([])(folder)
      // The count of cluster 200, in the first refcount block, which is the third cluster.
      fs.truncateSync(folder.path(IMAGE), 200 * 65_536)
      fs.appendFileSync(folder.path(IMAGE), Buffer.alloc(65_536, 1))
      setByte(folder.path(IMAGE), 2 * 65_536 + 200 * 2 + 1, 1)
    },
  },
  {
    what: 'with internal snapshots',
    make: (folder) => {
      written([])(folder)
      folder.qemuImg('snapshot', '-c', 'first', folder.path(IMAGE))
      folder.io(IMAGE, 'write -P 9 200k 1M')
      folder.qemuImg('snapshot', '-c', 'second', folder.path(IMAGE))
    },
  },
  {
    what: 'with persistent bitmaps',
    make: (folder) => {
      written([])(folder)
      folder.qemuImg('bitmap', '--add', folder.path(IMAGE), 'one')
      folder.qemuImg('bitmap', '--add', '-g', '4k', '--disable', folder.path(IMAGE), 'two, with a longer name')
      folder.io(IMAGE, 'write -P 9 200k 1M')
    },
  },
  {
    what: 'with bitmaps that a program did not know',
    make: (folder) => {
      written([])(folder)
      folder.qemuImg('bitmap', '--add', folder.path(IMAGE), 'one')
      setByte(folder.path(IMAGE), 95, 0)
    },
    differs: [
      {
        tool: 'info',
        field: 'bitmaps',
        why: 'QEMU hides what it cannot trust; Varve lists it as in use, to be removed',
      },
      { tool: 'chain', field: 'bitmaps', why: 'likewise' },
    ],
  },
  {
    what: 'with preallocated metadata',
    make: written(option('preallocation=metadata')),
    differs: [
      {
        tool: 'map',
        field: 'all',
        why: 'QEMU looks for holes in a file much smaller than its clusters; Varve does not',
      },
      { tool: 'measure', field: 'required', why: 'likewise' },
    ],
    isSparse: true,
  },
  { what: 'raw', format: 'raw', make: (folder) => folder.create('image.raw', '8M') },
  {
    what: 'raw with holes',
    format: 'raw',
    make: (folder) => {
      folder.create('image.raw', '8M')
      folder.io('image.raw', 'write -P 1 64k 128k', 'write -P 1 4M 1M')
    },
  },
  {
    what: 'raw with an odd size',
    format: 'raw',
    make: (folder) => fs.writeFileSync(folder.path('image.raw'), Buffer.alloc(10_000, 1)),
    differs: [
      {
        tool: 'info',
        field: 'virtual-size',
        why: 'QEMU counts the disk in sectors of 512 bytes; Varve says what there is',
      },
      { tool: 'chain', field: 'virtual-size', why: 'likewise' },
      { tool: 'map', field: 'all', why: 'likewise' },
    ],
  },
]

function fillHoles(file: string): void {
  fs.writeFileSync(file, fs.readFileSync(file))
}

function setByte(file: string, offset: number, value: number): void {
  const descriptor = fs.openSync(file, 'r+')
  fs.writeSync(descriptor, Uint8Array.of(value), 0, 1, offset)
  fs.closeSync(descriptor)
}

function makeFolder(t: TestContext): Folder {
  const root = tempFolder(t)
  const inFolder = (name: string): string => path.join(root, name)
  const formatOf = (name: string): string => path.extname(name).slice(1)
  return {
    path: inFolder,
    create: (name, size, ...options) =>
      void peer('qemu-img', 'create', '-q', '-f', formatOf(name), ...options, inFolder(name), size),
    io: (name, ...commands) =>
      void peer('qemu-io', '-f', formatOf(name), ...commands.flatMap((command) => ['-c', command]), inFolder(name)),
    qemuImg: (...args) => void peer('qemu-img', ...args),
  }
}

/** The arguments of each tool, which both programs understand. */
const TOOLS: Readonly<Record<Tool, (format: string) => readonly string[]>> = {
  info: (format) => ['info', '-f', format, '--output=json'],
  chain: (format) => ['info', '-f', format, '--backing-chain', '--output=json'],
  map: (format) => ['map', '-f', format, '--output=json'],
  check: (format) => ['check', '-f', format, '--output=json'],
  measure: (format) => ['measure', '-f', format, '-O', 'qcow2', '--output=json'],
}

/** Where Varve's JSON has more than that of QEMU 7.2: `compressed` came to `map` in 8.2. */
const NEWER_FIELDS = ['compressed']

function without(fields: readonly string[], json: unknown): unknown {
  if (Array.isArray(json)) return json.map((entry) => without(fields, entry))
  if (typeof json !== 'object' || json === null) return json
  const kept = Object.entries(json).filter(([name]) => !fields.includes(name))
  return Object.fromEntries(kept.map(([name, value]) => [name, without(fields, value)]))
}

suite('varve image says what qemu-img says', SKIP, () => {
  for (const { what, make, format = 'qcow2', differs = [], isSparse = false } of SUBJECTS) {
    test(`of an image ${what}`, async (t) => {
      const folder = makeFolder(t)
      make(folder)
      if (format === 'qcow2' && !isSparse) fillHoles(folder.path(IMAGE))
      const image = folder.path(`image.${format}`)
      for (const [tool, argumentsOf] of Object.entries(TOOLS) as [Tool, (typeof TOOLS)[Tool]][]) {
        if (tool === 'check' && format === 'raw') continue
        const args = [...argumentsOf(format), image]
        const theirs = runPeer('qemu-img', args)
        const ours = await beginCommand(['image', ...args]).ended
        const note = `${args.join(' ')}\n${theirs.stdout}${theirs.stderr}\n${ours.stdout}${ours.stderr}`
        assert.equal(ours.status !== 0, theirs.status !== 0, note)
        const excepted = differs.filter((difference) => difference.tool === tool).map(({ field }) => field)
        if (excepted.includes('all')) continue
        const compared = (text: string): unknown => without([...NEWER_FIELDS, ...excepted], JSON.parse(text))
        assert.deepEqual(compared(ours.stdout), compared(theirs.stdout), note)
      }
    })
  }
})
