// The journals that a guest keeps (init.sh), read from images by e2fsprogs and checked byte by byte: no line missing or wrong, no blob
// that a line promises torn, and disks of one moment where they were together.

import assert from 'node:assert/strict'
import { createHash } from 'node:crypto'
import fs from 'node:fs'
import path from 'node:path'
import { crc32 } from 'node:zlib'
import { peer, runPeer } from '../support/peer.ts'

const BLOB = 32 * 1024
/** As in init.sh. */
const PLACES = 256

/** The lines that a disk holds: numbers without a gap. Both 0: none. */
export interface GuestJournal {
  readonly first: number
  readonly last: number
}

/** Makes an image of an empty ext4 file system, 64 MiB unless told, for a guest's journal. */
export function makeGuestDisk(image: string, format: 'raw' | 'qcow2', mib = 64): void {
  const raw = format === 'raw' ? image : `${image}.raw`
  fs.rmSync(raw, { force: true })
  fs.closeSync(fs.openSync(raw, 'w'))
  fs.truncateSync(raw, mib * 1024 * 1024)
  peer('mke2fs', '-q', '-F', '-t', 'ext4', '-E', 'lazy_itable_init=0,lazy_journal_init=0', raw)
  if (format === 'raw') return
  peer('qemu-img', 'convert', '-f', 'raw', '-O', format, raw, image)
  fs.rmSync(raw)
}

/**
 * The journal in an image of a guest's disk as it was at some moment. The image is not changed: a copy of it gets what a guest does at its
 * mount, the replay of the file system's own journal, after which nothing may be left to repair.
 */
export function journalOf(image: string, format: 'raw' | 'qcow2'): GuestJournal {
  const folder = fs.mkdtempSync(path.join(path.dirname(image), 'journal-'))
  try {
    const copy = path.join(folder, 'copy')
    peer('qemu-img', 'convert', '-U', '-f', format, '-O', 'raw', image, copy)
    // 0: clean; 1: the file system's journal was replayed.
    const replayed = runPeer('e2fsck', ['-fp', copy])
    assert.ok(replayed.status <= 1, `e2fsck of ${image}: ${replayed.stdout}${replayed.stderr}`)
    const checked = runPeer('e2fsck', ['-fn', copy])
    assert.equal(checked.status, 0, `e2fsck of ${image}: ${checked.stdout}${checked.stderr}`)
    const files = ['journal', 'noise'].map((name) => {
      const file = path.join(folder, name)
      peer('debugfs', '-R', `dump /${name} ${file}`, copy)
      return fs.existsSync(file) ? fs.readFileSync(file) : Buffer.alloc(0)
    })
    return checkJournal(image, files[0] as Buffer, files[1] as Buffer)
  } finally {
    fs.rmSync(folder, { recursive: true, force: true })
  }
}

/** Fails unless these disks, in the order of their names, were all as they were at one moment. */
export function assertOneMoment(journals: readonly GuestJournal[]): void {
  const lasts = journals.map((journal) => journal.last)
  const isOrdered = lasts.every((last, index) => index === 0 || last <= (lasts[index - 1] as number))
  assert.ok(
    isOrdered && (lasts[0] as number) - (lasts.at(-1) as number) <= 1,
    `not one moment: lines ${lasts.join(', ')}`,
  )
}

function checkJournal(image: string, text: Buffer, noise: Buffer): GuestJournal {
  // A line that was being appended may be there in part: it was not synced.
  const lines = text.toString('latin1').split('\n').slice(0, -1)
  if (lines.length === 0) return { first: 0, last: 0 }
  const sums = lines.map((line, index) => {
    const [number, md5, sum] = line.split(' ')
    assert.equal(
      sum,
      crc32(`${number} ${md5}\n`).toString(16).padStart(8, '0'),
      `${image}: line ${index + 1}: '${line}'`,
    )
    return { number: Number(number), md5 }
  })
  const first = sums[0]?.number ?? 0
  const last = first + sums.length - 1
  sums.forEach(({ number }, index) => assert.equal(number, first + index, `${image}: lines are missing or twice`))
  // The place of the next line may hold its blob already, or a part of it.
  const newest = sums.slice(-(PLACES - 1))
  for (const { number, md5 } of newest) {
    const at = (number % PLACES) * BLOB
    const found = createHash('md5')
      .update(noise.subarray(at, at + BLOB))
      .digest('hex')
    assert.equal(found, md5, `${image}: the blob of line ${number}, of ${first} to ${last}`)
  }
  return { first, last }
}
