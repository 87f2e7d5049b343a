// Reads files and directories of an ext2, ext3 or ext4 file system on any device, without mounting it: nothing of it reaches the kernel of
// this host. What the file system says is checked before it is used; damage is an error, never a read outside the device or a loop. Its
// journal is not replayed, and it writes nothing.
//
//   path -> inode number -> group descriptor -> inode -> runs -> blocks

import { EXT_BLOCKS_KEPT, EXT_DIRECTORY_MAX, EXT_LINK_BYTES_MAX, EXT_LINKS_MAX, EXT_PIECE } from '../../base/limits.ts'
import { divideUp } from '../../base/round.ts'
import type { BlockDevice } from '../../block/device.ts'
import { BlockError } from '../../block/error.ts'
import { extentRuns, joined, listedRuns, type Run } from './block-map.ts'
import { decodeInode, type Inode } from './inode.ts'
import { readSuperblock, type Superblock } from './superblock.ts'

const ROOT_INODE = 2
/** A link up to this many bytes is in its inode, in place of the map. */
const SHORT_LINK_MAX = 60
const ENTRY_HEADER = 8

/** What a directory has. */
export interface DirectoryEntry {
  readonly name: string
  readonly inode: Inode
}

/** A part of a file; without bytes it is zeros that take no place. */
export interface FilePiece {
  readonly offset: number
  readonly length: number
  readonly bytes: Uint8Array | undefined
}

export class ExtFileSystem {
  readonly #device: BlockDevice
  readonly #super: Superblock
  /** By number; the order is that of use, oldest first. */
  readonly #blocks = new Map<number, Buffer>()

  private constructor(device: BlockDevice, superblock: Superblock) {
    this.#device = device
    this.#super = superblock
  }

  /** Kinds as for `readSuperblock`. */
  static async open(device: BlockDevice): Promise<ExtFileSystem> {
    return new ExtFileSystem(device, await readSuperblock(device))
  }

  /** What was written last before its moment may be in its journal alone, and is then not shown. */
  get needsRecovery(): boolean {
    return this.#super.needsRecovery
  }

  /** What a path leads to, over links. Kinds: 'not-found', 'invalid-argument' for a path through what is no directory, 'corrupt'. */
  async find(path: string): Promise<Inode> {
    // From the root down: '..' of a directory is the one that the path came through.
    const stack = [await this.#inode(ROOT_INODE)]
    const rest = namesOf(path)
    for (let links = 0; rest.length > 0; ) {
      const name = rest.shift() as string
      const here = stack.at(-1) as Inode
      if (here.type !== 'directory') {
        throw new BlockError(
          'invalid-argument',
          `${path}: before ${name} it leads to a ${here.type}, not to a directory`,
        )
      }
      if (name === '..') {
        if (stack.length > 1) stack.pop()
        continue
      }
      const number = await this.#lookUp(here, name)
      if (number === undefined) throw new BlockError('not-found', `there is no ${path}: no ${name} in it`)
      const found = await this.#inode(number)
      if (found.type !== 'link') {
        stack.push(found)
        continue
      }
      if (++links > EXT_LINKS_MAX) throw this.#damaged(`${path} leads over more than ${EXT_LINKS_MAX} links`)
      const target = await this.readLink(found)
      if (target.startsWith('/')) stack.length = 1
      rest.unshift(...namesOf(target))
    }
    return stack.at(-1) as Inode
  }

  /** The entries of a directory, without '.' and '..', by name. An entry whose inode is damaged fails all. */
  async list(directory: Inode): Promise<DirectoryEntry[]> {
    const found: DirectoryEntry[] = []
    for await (const [name, number] of this.#entries(directory)) {
      if (name !== '.' && name !== '..') found.push({ name, inode: await this.#inode(number) })
    }
    return found.sort((a, b) => (a.name < b.name ? -1 : 1))
  }

  async readLink(link: Inode): Promise<string> {
    if (link.size > EXT_LINK_BYTES_MAX) throw this.#damaged(`link ${link.number} has ${link.size} bytes`)
    if (link.size < SHORT_LINK_MAX && link.map === 'lists') return link.root.toString('utf8', 0, link.size)
    const parts: Uint8Array[] = []
    for await (const { bytes, length } of this.read(link)) parts.push(bytes ?? Buffer.alloc(length))
    return Buffer.concat(parts).toString('utf8')
  }

  /** The content of a file, in order and whole. Kinds 'corrupt', 'unsupported' for content that is not read here. */
  async *read(inode: Inode): AsyncGenerator<FilePiece> {
    const { blockSize } = this.#super
    if (inode.unread !== undefined)
      throw new BlockError('unsupported', `${this.#device.name}: inode ${inode.number} ${inode.unread}`)
    if (!Number.isSafeInteger(inode.size)) throw this.#damaged(`inode ${inode.number} has ${inode.size} bytes`)
    let position = 0
    for await (const { first, count, place } of this.#runs(inode)) {
      const start = Math.min(first * blockSize, inode.size)
      const end = Math.min((first + count) * blockSize, inode.size)
      if (start > position) yield hole(position, start)
      position = Math.max(position, end)
      if (start >= end) continue
      if (place === undefined) yield hole(start, end)
      else yield* this.#stored(start, end, place)
    }
    if (position < inode.size) yield hole(position, inode.size)
  }

  async *#stored(start: number, end: number, place: number): AsyncGenerator<FilePiece> {
    const { blockSize, blocks } = this.#super
    if (place < 1 || place + divideUp(end - start, blockSize) > blocks)
      throw this.#damaged(`a file has blocks from ${place} on, outside the file system`)
    for (let at = start; at < end; at += EXT_PIECE) {
      const length = Math.min(EXT_PIECE, end - at)
      yield { offset: at, length, bytes: await this.#bytes(place * blockSize + at - start, length) }
    }
  }

  #runs(inode: Inode): AsyncGenerator<Run> {
    const { blockSize } = this.#super
    const read = (block: number): Promise<Buffer> => this.#block(block)
    if (inode.map === 'extents')
      return joined(extentRuns(inode.root, read, `${this.#device.name}: inode ${inode.number}`))
    return joined(listedRuns(inode.root, divideUp(inode.size, blockSize), blockSize / 4, read))
  }

  async #lookUp(directory: Inode, wanted: string): Promise<number | undefined> {
    for await (const [name, number] of this.#entries(directory)) if (name === wanted) return number
    return undefined
  }

  /** Names and inode numbers, in no order. The nodes of a hashed directory look like entries of nothing, and are passed over. */
  async *#entries(directory: Inode): AsyncGenerator<[name: string, inode: number]> {
    const { blockSize } = this.#super
    if (directory.type !== 'directory')
      throw new BlockError('invalid-argument', `a ${directory.type} has no entries: it is no directory`)
    if (directory.size > EXT_DIRECTORY_MAX) throw this.#damaged(`a directory has ${directory.size} bytes`)
    for await (const { bytes } of this.read(directory)) {
      if (bytes === undefined) continue
      const piece = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.length)
      for (let block = 0; block < piece.length; block += blockSize) {
        yield* this.#entriesOf(piece.subarray(block, block + blockSize))
      }
    }
  }

  *#entriesOf(block: Buffer): Generator<[name: string, inode: number]> {
    for (let at = 0; at + ENTRY_HEADER <= block.length; ) {
      const inode = block.readUInt32LE(at)
      // 65,536 does not fit: a block that large is told as 65,535 or 0.
      const said = block.readUInt16LE(at + 4)
      const length = said === 65_535 || said === 0 ? block.length - at : said
      const nameLength = block.readUInt8(at + 6)
      const isRight = length >= ENTRY_HEADER && length % 4 === 0 && at + length <= block.length
      if (!isRight || (inode !== 0 && nameLength + ENTRY_HEADER > length)) throw this.#damaged('a directory is damaged')
      if (inode !== 0) {
        const name = block.toString('utf8', at + ENTRY_HEADER, at + ENTRY_HEADER + nameLength)
        yield [name, inode]
      }
      at += length
    }
  }

  async #inode(number: number): Promise<Inode> {
    const { inodes, inodesPerGroup, inodeSize, descriptorBlock, descriptorSize, blockSize } = this.#super
    if (number < 1 || number > inodes) throw this.#damaged(`an entry leads to inode ${number} of ${inodes}`)
    const group = Math.floor((number - 1) / inodesPerGroup)
    const descriptorAt = group * descriptorSize
    const block = await this.#block(descriptorBlock + Math.floor(descriptorAt / blockSize))
    const at = descriptorAt % blockSize
    const high = descriptorSize >= 64 ? block.readUInt32LE(at + 40) : 0
    const table = high * 0x1_0000_0000 + block.readUInt32LE(at + 8)
    const inTable = ((number - 1) % inodesPerGroup) * inodeSize
    const bytes = await this.#block(table + Math.floor(inTable / blockSize))
    const inode = decodeInode(bytes.subarray(inTable % blockSize, (inTable % blockSize) + inodeSize), number)
    if (inode === undefined) throw this.#damaged(`an entry leads to inode ${number}, which is none`)
    return inode
  }

  /** A block of what describes files; the last ones are kept. */
  async #block(number: number): Promise<Buffer> {
    const { blockSize, blocks } = this.#super
    const kept = this.#blocks.get(number)
    if (kept !== undefined) {
      this.#blocks.delete(number)
      this.#blocks.set(number, kept)
      return kept
    }
    if (number < 1 || number >= blocks) throw this.#damaged(`block ${number} is wanted of ${blocks}`)
    const block = await this.#bytes(number * blockSize, blockSize)
    this.#blocks.set(number, block)
    if (this.#blocks.size > EXT_BLOCKS_KEPT) this.#blocks.delete(this.#blocks.keys().next().value as number)
    return block
  }

  async #bytes(offset: number, length: number): Promise<Buffer> {
    const bytes = Buffer.alloc(length)
    const pending = this.#device.read(offset, length, bytes, 0)
    if (pending !== undefined) await pending
    return bytes
  }

  #damaged(what: string): BlockError {
    return new BlockError('corrupt', `${this.#device.name}: the file system is damaged: ${what}`, {
      device: this.#device.name,
    })
  }
}

function hole(start: number, end: number): FilePiece {
  return { offset: start, length: end - start, bytes: undefined }
}

function namesOf(path: string): string[] {
  return path.split('/').filter((name) => name !== '' && name !== '.')
}
