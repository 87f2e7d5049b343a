// One of the two log areas of a disk: records from the front of a preallocated file, which never grows. Appending does not
// sync. What a record means is not known here.
//
// Where the host can have a file as memory, a window of it is: a record is then a store of 32 bytes, which the page cache has at once,
// in place of a system call.

import { isZero } from '../base/bytes.ts'
import { DIRTYLOG_PIECE, DIRTYLOG_WINDOW } from '../base/limits.ts'
import { roundDown } from '../base/round.ts'
import type { Pending } from '../block/device.ts'
import type { HostFile, MappedRange } from '../host/host.ts'
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
  #window: MappedRange | undefined
  /** Bytes of the file; the window has those from the start to before the end. */
  #windowStart = 0
  #windowEnd = 0
  #isMapped = true

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
    const at = this.#position * RECORD_BYTES
    if ((at >= this.#windowStart && at < this.#windowEnd) || this.#moveWindow(at)) {
      this.#window?.bytes.set(encoder.bytes, at - this.#windowStart)
      this.#position++
      return undefined
    }
    const written = this.file.write(this.#position * RECORD_BYTES, RECORD_BYTES, encoder.bytes, 0)
    // The file keeps the buffer until it is done.
    if (written !== undefined) this.#encoder = new RecordEncoder()
    this.#position++
    return written
  }

  /** Before the file is closed. */
  release(): void {
    this.#isMapped = false
    this.#windowEnd = 0
    this.#window?.release()
    this.#window = undefined
  }

  /** True when the window has what is at this byte of the file now. */
  #moveWindow(at: number): boolean {
    if (!this.#isMapped) return false
    this.release()
    const start = roundDown(at, DIRTYLOG_WINDOW)
    const end = Math.min(start + DIRTYLOG_WINDOW, this.capacity * RECORD_BYTES)
    this.#window = this.file.map?.(start, end - start)
    if (this.#window === undefined) return false
    this.#isMapped = true
    this.#windowStart = start
    this.#windowEnd = end
    return true
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
