// Images for the benchmarks: full of random data, so that nothing in them is a hole and every read moves bytes; chains over one;
// and how they are brought into the page cache and kept clean there.

import { randomFillSync } from 'node:crypto'
import fs from 'node:fs'
import path from 'node:path'
import { check, MIB, residentShare } from './machine.ts'

/** Of an image that counts as cached. */
const RESIDENT = 0.995

/**
 * An image is written in clusters, as guests and qemu-img write it. The page cache keeps a file in the pieces in which it was written, and where
 * they are of megabytes a random write of 4 KiB takes Linux 30 µs instead of 2, whoever the server is: that would be measured.
 */
const WRITTEN_BYTES = 64 * 1024

export type ImageFormat = 'raw' | 'qcow2'

/** Makes an image of random data. */
export function makeImage(file: string, format: ImageFormat, sizeMiB: number): void {
  const raw = format === 'raw' ? file : `${file}.raw`
  const piece = Buffer.alloc(WRITTEN_BYTES)
  const fd = fs.openSync(raw, 'w')
  for (let at = 0; at < sizeMiB * MIB; at += piece.length) fs.writeSync(fd, randomFillSync(piece), 0, piece.length, at)
  fs.fsyncSync(fd)
  fs.closeSync(fd)
  if (format === 'raw') return
  check('qemu-img', 'convert', '-f', 'raw', '-O', 'qcow2', raw, file)
  fs.rmSync(raw)
}

/** Puts empty overlays over an image, in its folder; returns the topmost. */
export function makeOverlays(base: string, format: ImageFormat, count: number): string {
  let below = { file: base, format: format as string }
  for (let number = 1; number <= count; number++) {
    const file = `${base}.${number}`
    check('qemu-img', 'create', '-q', '-f', 'qcow2', '-b', path.basename(below.file), '-F', below.format, file)
    below = { file, format: 'qcow2' }
  }
  return below.file
}

/** Sees to it that the image is in the page cache and clean, so that no round pays for the one before. */
export function settle(file: string, isWrite: boolean): void {
  // The system may take pages away while it reads others ahead: a few times it is asked again.
  for (let tries = 0; residentShare(file) < RESIDENT; tries++) {
    if (tries === 5) throw new Error(`${file} does not stay in the page cache; free some memory`)
    readThrough(file)
  }
  if (isWrite) sync(file)
}

export function sync(file: string): void {
  const fd = fs.openSync(file, 'r+')
  fs.fsyncSync(fd)
  fs.closeSync(fd)
}

function readThrough(file: string): void {
  const piece = Buffer.alloc(8 * MIB)
  const fd = fs.openSync(file, 'r')
  while (fs.readSync(fd, piece) > 0);
  fs.closeSync(fd)
}
