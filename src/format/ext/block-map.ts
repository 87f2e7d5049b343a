// Where the content of one inode is: its runs, in order, from a tree of extents (ext4) or from lists of blocks in up to three levels (ext2,
// ext3). Every block number is checked; a tree that does not go down or forward is refused, so that reading ends.
//
//   extents    header 12 | entry 12 | entry 12 | ...        depth 0: block, count, place; else: block, place of the next node
//   lists      12 places | list | list of lists | list of lists of lists

import { BlockError } from '../../block/error.ts'

/** Blocks of a file, and where they are; without a place they read as zeros. Counted in blocks. */
export interface Run {
  readonly first: number
  readonly count: number
  readonly place: number | undefined
}

/** Reads a block of the file system, whose number is checked. */
export type ReadBlock = (block: number) => Promise<Buffer>

const EXTENT_MAGIC = 0xf30a
const EXTENT_BYTES = 12
const DEPTH_MAX = 5
/** Longer ones are not written yet, and read as zeros. */
const EXTENT_WRITTEN_MAX = 32_768
const DIRECT = 12
const LEVELS = 3

/** The runs of a tree of extents whose root is `root`, the 60 bytes in the inode. Kind 'corrupt'. */
export async function* extentRuns(root: Buffer, read: ReadBlock, name: string): AsyncGenerator<Run> {
  let next = 0
  for await (const run of walkExtents(root, undefined, read, name)) {
    // Each one goes forward, so that there is an end.
    if (run.first < next) throw damaged(name, 'its extents are not in order')
    yield run
    next = run.first + run.count
  }
}

async function* walkExtents(
  node: Buffer,
  depth: number | undefined,
  read: ReadBlock,
  name: string,
): AsyncGenerator<Run> {
  const count = node.readUInt16LE(2)
  const level = node.readUInt16LE(6)
  const isRoot = depth === undefined
  const isRight = isRoot ? level <= DEPTH_MAX : level === depth && count > 0
  if (node.readUInt16LE(0) !== EXTENT_MAGIC || !isRight || (count + 1) * EXTENT_BYTES > node.length)
    throw damaged(name, 'its tree of extents is damaged')
  for (let at = EXTENT_BYTES; at <= count * EXTENT_BYTES; at += EXTENT_BYTES) {
    if (level > 0) {
      const place = node.readUInt32LE(at + 4) + node.readUInt16LE(at + 8) * 0x1_0000_0000
      yield* walkExtents(await read(place), level - 1, read, name)
      continue
    }
    const said = node.readUInt16LE(at + 4)
    const isWritten = said <= EXTENT_WRITTEN_MAX
    const length = isWritten ? said : said - EXTENT_WRITTEN_MAX
    if (length === 0) throw damaged(name, 'it has an extent of no blocks')
    const place = node.readUInt32LE(at + 8) + node.readUInt16LE(at + 6) * 0x1_0000_0000
    yield { first: node.readUInt32LE(at), count: length, place: isWritten ? place : undefined }
  }
}

/** The runs of the first `blocks` blocks of a file, from the 15 numbers in the inode; a list has `perList` numbers. */
export async function* listedRuns(root: Buffer, blocks: number, perList: number, read: ReadBlock): AsyncGenerator<Run> {
  for (let first = 0; first < DIRECT && first < blocks; first++) yield runOf(root.readUInt32LE(first * 4), first, 1)
  let first = DIRECT
  for (let level = 1; level <= LEVELS && first < blocks; level++) {
    yield* walkList({ place: root.readUInt32LE((DIRECT + level - 1) * 4), level, first, blocks, perList, read })
    first += perList ** level
  }
}

interface List {
  readonly place: number
  readonly level: number
  readonly first: number
  readonly blocks: number
  readonly perList: number
  readonly read: ReadBlock
}

async function* walkList(list: List): AsyncGenerator<Run> {
  const { place, level, first, blocks, perList, read } = list
  if (place === 0) {
    yield runOf(0, first, Math.min(perList ** level, blocks - first))
    return
  }
  const numbers = await read(place)
  const span = perList ** (level - 1)
  for (let index = 0, at = first; index < perList && at < blocks; index++, at += span) {
    const next = numbers.readUInt32LE(index * 4)
    if (level === 1) yield runOf(next, at, 1)
    else yield* walkList({ ...list, place: next, level: level - 1, first: at })
  }
}

function runOf(place: number, first: number, count: number): Run {
  return { first, count, place: place === 0 ? undefined : place }
}

/** The same runs, neighbours as one. */
export async function* joined(runs: AsyncGenerator<Run>): AsyncGenerator<Run> {
  let last: Run | undefined
  for await (const run of runs) {
    if (last !== undefined && continues(last, run)) last = { ...last, count: last.count + run.count }
    else {
      if (last !== undefined) yield last
      last = run
    }
  }
  if (last !== undefined) yield last
}

function continues(last: Run, { first, place }: Run): boolean {
  if (last.first + last.count !== first) return false
  return last.place === undefined ? place === undefined : place === last.place + last.count
}

function damaged(name: string, what: string): BlockError {
  return new BlockError('corrupt', `${name}: ${what}`, { device: name })
}
