// Places of a disk that somebody waits for while it is copied, so that the copy takes them first. Whoever waits is answered all the
// same: what is forgotten here is copied in its turn.

import { WANTED_PLACES } from '../base/limits.ts'
import { roundDown } from '../base/round.ts'

export class Wanted {
  readonly #piece: number
  readonly #places = new Set<number>()

  /** `piece` is what the copy takes at a time, in bytes. */
  constructor(piece: number) {
    this.#piece = piece
  }

  /** Forgets what comes while there are too many. */
  add(offset: number, length: number): void {
    for (let at = roundDown(offset, this.#piece); at < offset + length; at += this.#piece) {
      if (this.#places.size >= WANTED_PLACES) return
      this.#places.add(at)
    }
  }

  /** The start of a piece, that which was wanted first. */
  take(): number | undefined {
    for (const place of this.#places) {
      this.#places.delete(place)
      return place
    }
    return undefined
  }
}
