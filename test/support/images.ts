// Images for the tests of the offline tools: content as disks have it, in every format, with and without backing files.

import fs from 'node:fs'
import path from 'node:path'
import type { Random } from '../../src/base/random.ts'
import { peer } from './peer.ts'

const KIB = 1024

/** A raw file with random runs of noise, text, written zeros and holes, aligned as a guest aligns them; returns its content. */
export function writeRawDisk(file: string, size: number, random: Random): Buffer {
  const bytes = Buffer.alloc(size)
  const fd = fs.openSync(file, 'w')
  fs.ftruncateSync(fd, size)
  for (let offset = 0; offset < size; ) {
    const unit = random.chance(0.5) ? 4 * KIB : 64 * KIB
    const length = Math.min(size - offset, unit * random.between(1, 12))
    const piece = bytes.subarray(offset, offset + length)
    const kind = random.below(4)
    if (kind === 0) random.fill(piece)
    else if (kind === 1) piece.fill(`varve ${offset} `)
    if (kind < 3) fs.writeSync(fd, piece, 0, length, offset)
    offset += length
  }
  fs.closeSync(fd)
  return bytes
}

/** Runs qemu-io's commands on an image. */
export function qemuIo(image: string, format: string, ...commands: string[]): void {
  peer('qemu-io', '-f', format, ...commands.flatMap((command) => ['-c', command]), image)
}

/** What an image shows, by QEMU. */
export function contentByQemu(image: string, format: string, folder: string): Buffer {
  const raw = path.join(folder, `${path.basename(image)}.content`)
  peer('qemu-img', 'convert', '-f', format, '-O', 'raw', image, raw)
  const bytes = fs.readFileSync(raw)
  fs.rmSync(raw)
  return bytes
}

/** Overwrites the start of the compressed data of the cluster at `offset` of an image with clusters of 64 KiB. */
export function breakCompressedCluster(image: string, offset: number): void {
  const fd = fs.openSync(image, 'r+')
  const field = Buffer.alloc(8)
  const read = (at: number): bigint => {
    fs.readSync(fd, field, 0, 8, at)
    return field.readBigUInt64BE()
  }
  const table = Number(read(Number(read(40))) & 0x00ff_ffff_ffff_fe00n)
  const entry = read(table + (offset / (64 * KIB)) * 8)
  fs.writeSync(fd, Buffer.alloc(64, 0xff), 0, 64, Number(entry & ((1n << 54n) - 1n)))
  fs.closeSync(fd)
}
