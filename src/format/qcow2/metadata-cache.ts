// Pieces of L2 tables and of refcount blocks in memory, of all images of this thread under one budget: the ones used
// longest ago go first. A piece holds the bytes as they are in the file, or newer ones when it is dirty; its owner writes
// those before it goes. A pinned piece stays, and so does one that cannot be written now: then the budget is exceeded.

import { QCOW2_METADATA_BYTES, QCOW2_METADATA_PIECE_MIN } from '../../base/limits.ts'

/** Whose piece it is. */
export interface PieceOwner {
  /** The piece is gone. */
  dropped(number: number): void
  /** Writes a dirty piece. False when that takes time (it is pinned meanwhile) or failed, so that it has to stay. */
  clean(piece: Piece): boolean
}

export interface Piece {
  readonly owner: PieceOwner
  readonly number: number
  readonly bytes: Uint8Array
  isDirty: boolean
  pins: number
  newer: Piece | undefined
  older: Piece | undefined
}

export class MetadataCache {
  #budget: number
  #bytes = 0
  #newest: Piece | undefined
  #oldest: Piece | undefined

  constructor(budget: number = QCOW2_METADATA_BYTES) {
    this.#budget = budget
  }

  /** Bytes of memory that the pieces take. */
  get bytes(): number {
    return this.#bytes
  }

  /** Bytes of memory that they may take, unless more are pinned or dirty. */
  get budget(): number {
    return this.#budget
  }

  set budget(bytes: number) {
    this.#budget = bytes
    this.#makeRoom(undefined)
  }

  /** Takes a piece in, and drops others as the budget demands, never the new one. */
  add(owner: PieceOwner, number: number, bytes: Uint8Array): Piece {
    const piece: Piece = { owner, number, bytes, isDirty: false, pins: 0, newer: undefined, older: undefined }
    this.#bytes += cost(piece)
    this.#link(piece)
    if (this.#bytes > this.#budget) this.#makeRoom(piece)
    return piece
  }

  touch(piece: Piece): void {
    if (piece === this.#newest) return
    this.#unlink(piece)
    this.#link(piece)
  }

  remove(piece: Piece): void {
    this.#unlink(piece)
    this.#bytes -= cost(piece)
  }

  #makeRoom(kept: Piece | undefined): void {
    const last = this.#newest
    let candidate = this.#oldest
    while (this.#bytes > this.#budget && candidate !== undefined && candidate !== kept) {
      const next: Piece | undefined = candidate === last ? undefined : candidate.newer
      if (candidate.pins === 0 && (!candidate.isDirty || candidate.owner.clean(candidate))) {
        this.remove(candidate)
        candidate.owner.dropped(candidate.number)
      } else {
        // What cannot go now is not the first to be asked again.
        this.touch(candidate)
      }
      candidate = next
    }
  }

  #link(piece: Piece): void {
    piece.older = this.#newest
    piece.newer = undefined
    if (this.#newest === undefined) this.#oldest = piece
    else this.#newest.newer = piece
    this.#newest = piece
  }

  #unlink(piece: Piece): void {
    if (piece.newer === undefined) this.#newest = piece.older
    else piece.newer.older = piece.older
    if (piece.older === undefined) this.#oldest = piece.newer
    else piece.older.newer = piece.newer
  }
}

function cost({ bytes }: Piece): number {
  return Math.max(bytes.length, QCOW2_METADATA_PIECE_MIN)
}

/** The cache of this thread. */
export const metadataCache = new MetadataCache()
