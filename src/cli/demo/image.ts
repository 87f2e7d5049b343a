// The demo's disk: a real ext4 image made from real files of this machine and one preallocated file, inside whose extents the
// load writes, so that the file system stays whole. Without mke2fs: the same files one after the other, which it says.
//
//   ext4   | superblock .. | usr/share/... | load.bin ...... | ...        load region = load.bin's extents
//   plain  | files, each at a multiple of 4 KiB            | load region |

import { spawnSync } from 'node:child_process'
import fs from 'node:fs'
import path from 'node:path'
import { roundUp } from '../../base/round.ts'
import { BlockError } from '../../block/error.ts'
import { fillBlock, LOAD_BLOCK } from './stamp.ts'

const MIB = 1024 * 1024
const IMAGE_BYTES = 640 * MIB
const LOAD_BYTES = 96 * MIB
/** Enough to be real and few enough to be copied in seconds. */
const FILES_BYTES = 160 * MIB
const FILES_MAX = 2000
const FILE_BYTES_MIN = 16 * 1024
const FILE_BYTES_MAX = 8 * MIB
const SOURCES = ['/usr/bin', '/usr/lib', '/usr/share', '/etc']

export interface DemoImage {
  /** A raw image. */
  readonly path: string
  readonly size: number
  readonly fileSystem: 'ext4' | 'none'
  /** Offset in the image of each block that the load may write. */
  readonly blocks: Float64Array
  /** The largest of the files in it, which this machine has at the same path; undefined without a file system. */
  readonly sample: string | undefined
  /** What it is made of, for the timeline. */
  readonly description: string
}

export function hasProgram(name: string): boolean {
  return spawnSync('sh', ['-c', `command -v ${name}`]).status === 0
}

/** Makes the image in `folder`. Every block of the load region holds its stamp with sequence 0. */
export function makeImage(folder: string): DemoImage {
  const image = path.join(folder, 'original.raw')
  const files = findFiles()
  return hasProgram('mke2fs') && hasProgram('debugfs') ? makeExt4(folder, image, files) : makePlain(image, files)
}

function makeExt4(folder: string, image: string, files: readonly FoundFile[]): DemoImage {
  const staging = path.join(folder, 'files')
  let bytes = 0
  for (const file of files) {
    const target = path.join(staging, file.path)
    fs.mkdirSync(path.dirname(target), { recursive: true })
    fs.copyFileSync(file.path, target)
    bytes += file.size
  }
  writeLoadFile(path.join(staging, 'load.bin'))
  fs.closeSync(fs.openSync(image, 'w'))
  fs.truncateSync(image, IMAGE_BYTES)
  run('mke2fs', ['-q', '-F', '-t', 'ext4', '-b', String(LOAD_BLOCK), '-d', staging, image])
  fs.rmSync(staging, { recursive: true })
  const blocks = extentsOf(image, '/load.bin')
  const size = `${Math.round(bytes / MIB)} MiB in ${files.length} files of this machine`
  return {
    path: image,
    size: IMAGE_BYTES,
    fileSystem: 'ext4',
    blocks,
    sample: files.toSorted((a, b) => b.size - a.size)[0]?.path,
    description: `ext4 of ${IMAGE_BYTES / MIB} MiB, ${size}`,
  }
}

function makePlain(image: string, files: readonly FoundFile[]): DemoImage {
  const fd = fs.openSync(image, 'w')
  let offset = 0
  for (const file of files) {
    fs.writeSync(fd, fs.readFileSync(file.path), 0, null, offset)
    offset = roundUp(offset + file.size, LOAD_BLOCK)
  }
  const blocks = new Float64Array(LOAD_BYTES / LOAD_BLOCK)
  const block = Buffer.alloc(LOAD_BLOCK)
  for (let index = 0; index < blocks.length; index++) {
    fillBlock(block, index, 0)
    blocks[index] = offset + index * LOAD_BLOCK
    fs.writeSync(fd, block, 0, LOAD_BLOCK, blocks[index])
  }
  fs.ftruncateSync(fd, IMAGE_BYTES)
  fs.closeSync(fd)
  const description = `${IMAGE_BYTES / MIB} MiB of ${files.length} files without a file system: mke2fs is not installed`
  return { path: image, size: IMAGE_BYTES, fileSystem: 'none', blocks, sample: undefined, description }
}

interface FoundFile {
  readonly path: string
  readonly size: number
}

/** Real files, in a fixed order, up to FILES_BYTES in all. */
function findFiles(): FoundFile[] {
  const found: FoundFile[] = []
  let bytes = 0
  const folders = SOURCES.filter((folder) => fs.existsSync(folder)).toReversed()
  while (folders.length > 0 && bytes < FILES_BYTES && found.length < FILES_MAX) {
    const folder = folders.pop() as string
    for (const entry of readFolder(folder)) {
      const full = path.join(folder, entry.name)
      if (entry.isDirectory()) folders.push(full)
      if (!entry.isFile()) continue
      const size = readableSize(full)
      const fits = size !== undefined && size >= FILE_BYTES_MIN && size <= FILE_BYTES_MAX && bytes + size <= FILES_BYTES
      if (!fits || found.length >= FILES_MAX) continue
      found.push({ path: full, size })
      bytes += size
    }
  }
  return found
}

function readFolder(folder: string): fs.Dirent[] {
  try {
    return fs.readdirSync(folder, { withFileTypes: true })
  } catch {
    return []
  }
}

/** Undefined for a file that this user may not read. */
function readableSize(file: string): number | undefined {
  try {
    fs.accessSync(file, fs.constants.R_OK)
    return fs.statSync(file).size
  } catch {
    return undefined
  }
}

function writeLoadFile(file: string): void {
  const fd = fs.openSync(file, 'w')
  const piece = Buffer.alloc(256 * LOAD_BLOCK)
  for (let first = 0; first < LOAD_BYTES / LOAD_BLOCK; first += 256) {
    for (let i = 0; i < 256; i++) fillBlock(piece.subarray(i * LOAD_BLOCK, (i + 1) * LOAD_BLOCK), first + i, 0)
    fs.writeSync(fd, piece)
  }
  fs.closeSync(fd)
}

/** Where a file's blocks lie in an ext4 image, by debugfs: lines "level/depth entry/entries first - last physical - last length". */
function extentsOf(image: string, file: string): Float64Array {
  const listing = run('debugfs', ['-R', `dump_extents -l ${file}`, image])
  const blocks = new Float64Array(LOAD_BYTES / LOAD_BLOCK).fill(-1)
  for (const line of listing.split('\n')) {
    const match = /^\s*\d+\/\s*\d+\s+\d+\/\s*\d+\s+(\d+)\s*-\s*(\d+)\s+(\d+)\s*-/.exec(line)
    if (match === null) continue
    const [first, last, physical] = match.slice(1).map(Number) as [number, number, number]
    for (let index = first; index <= last; index++) blocks[index] = (physical + index - first) * LOAD_BLOCK
  }
  if (blocks.includes(-1)) throw new BlockError('io', `debugfs did not tell where ${file} lies in ${image}`)
  return blocks
}

function run(program: string, args: readonly string[]): string {
  const result = spawnSync(program, args, { encoding: 'utf8', maxBuffer: 64 * MIB })
  if (result.status === 0) return result.stdout
  throw new BlockError('io', `${program} failed: ${result.stderr.trim() || String(result.error ?? result.status)}`)
}
