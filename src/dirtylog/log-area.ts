// One of the two log areas of a disk: records from the front of a preallocated file, which never grows. Appending does not
// sync. What a record means is not known here.

import { isZero } from '../base/bytes.ts'
import { DIRTYLOG_PIECE } from '../base/limits.ts'
import type { Pending } from '../block/device.ts'
import type { HostFile } from '../host/host.ts'
import { decodeRecord, epochAt, type LogRecord, RECORD_BYTES, RecordEncoder, type RecordKind } from './spec.ts'

/** Makes a file of `length` bytes, all of them zeros, synced. */
export async function formatArea(file: HostFile, length: number): Promise<void> {
  await file.truncate(0)
  // Zeros that are really written: a sync of a record then has no allocation of the file system to wait for.
  const zeros = Buffer.alloc(Math.min(length, DIRTYLOG_PIECE))
  for (let done = 0; done < length; done += zeros.length) {
    await file.write(done, Math.min(zeros.length, length - done), zeros, 0)
  }
  await file.sync()
}

export class LogArea {
  readonly file: HostFile
  /** How many records fit. */
  readonly capacity: number
  #encoder = new RecordEncoder()
  #epoch = 0
  #position = 0

  constructor(file: HostFile) {
    this.file = file
    this.capacity = Math.floor(file.size() / RECORD_BYTES)
  }

  /** How many records this epoch has so far. */
  get position(): number {
    return this.#position
  }

  /** Goes back to the front; what is there belongs to an older epoch and no longer counts. */
  begin(epoch: number): void {
    this.#epoch = epoch
    this.#position = 0
  }

  /** Writes the next record; there must be room. Offset and length in bytes. Throws or rejects as the file does. */
  append(kind: RecordKind, bitmap: number, offset: number, length: number): Pending {
    const encoder = this.#encoder
    encoder.encode(this.#epoch, kind, bitmap, offset, length)
    const written = this.file.write(this.#position * RECORD_BYTES, RECORD_BYTES, encoder.bytes, 0)
    // The file keeps the buffer until it is done.
    if (written !== undefined) this.#encoder = new RecordEncoder()
    this.#position++
    return written
  }

  /** Visits the whole records of epoch `least` or a later one, in order, each with its position. */
  async scan(least: number, visit: (record: LogRecord, position: number) => void): Promise<void> {
    const size = this.capacity * RECORD_BYTES
    const piece = Buffer.alloc(Math.min(DIRTYLOG_PIECE, size))
    for (let start = 0; start < size; start += piece.length) {
      const length = Math.min(piece.length, size - start)
      const read = this.file.read(start, length, piece, 0)
      if (read !== undefined) await read
      // Most of an area was never written, and no record is all zeros.
      if (isZero(piece, 0, length)) continue
      for (let at = 0; at < length; at += RECORD_BYTES) {
        const record = epochAt(piece, at) < least ? undefined : decodeRecord(piece, at)
        if (record !== undefined) visit(record, (start + at) / RECORD_BYTES)
      }
    }
  }
}
