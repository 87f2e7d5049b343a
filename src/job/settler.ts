// When a copy makes its progress durable: after so many bytes or milliseconds since the last time. One lane of the copy does it while
// the others go on; what makes it durable is handed in.

import {
  CHECKPOINT_BYTES,
  CHECKPOINT_MS,
  COMMIT_IDLE_LANES,
  COMMIT_IDLE_PIECE,
  COMMIT_LANES,
  COPY_PIECE,
  RESTORE_LANES,
  RESTORE_PIECE,
  RESTORE_SETTLE_BYTES,
  RESTORE_SETTLE_MS,
  STREAM_LANES,
  STREAM_PIECE,
} from '../base/limits.ts'

/** How a merge copies: bytes at a time, pieces at once, and after how many bytes or milliseconds its progress is made durable. */
export interface MergePace {
  readonly piece: number
  readonly lanes: number
  /** As the copier's. */
  readonly idleLanes?: number
  readonly idlePiece?: number
  readonly settleBytes: number
  readonly settleMs: number
}

const SETTLED = { settleBytes: CHECKPOINT_BYTES, settleMs: CHECKPOINT_MS }

export type MergePaces = Readonly<Record<'commit' | 'stream' | 'restore', MergePace>>

export const MERGE_PACES: MergePaces = {
  commit: {
    piece: COPY_PIECE,
    lanes: COMMIT_LANES,
    idleLanes: COMMIT_IDLE_LANES,
    idlePiece: COMMIT_IDLE_PIECE,
    ...SETTLED,
  },
  stream: { piece: STREAM_PIECE, lanes: STREAM_LANES, idleLanes: STREAM_LANES, ...SETTLED },
  // A repository is read in threads of its own, whatever the guests do.
  restore: {
    piece: RESTORE_PIECE,
    lanes: RESTORE_LANES,
    settleBytes: RESTORE_SETTLE_BYTES,
    settleMs: RESTORE_SETTLE_MS,
  },
}

export class Settler {
  readonly #pace: MergePace
  readonly #settle: () => Promise<void>
  #sinceBytes = 0
  #sinceMs = performance.now()
  #running: Promise<void> | undefined

  constructor(pace: MergePace, settle: () => Promise<void>) {
    this.#pace = pace
    this.#settle = settle
  }

  /** After each piece. The promise, when progress is due, is for whoever copied that piece to wait for. */
  copied(length: number): Promise<void> | undefined {
    this.#sinceBytes += length
    const { settleBytes, settleMs } = this.#pace
    const isMuch = this.#sinceBytes >= settleBytes
    // While it goes on, no more is copied than would be due again: that is what a crash takes.
    if (this.#running !== undefined) return isMuch ? this.#running : undefined
    if (!isMuch && performance.now() - this.#sinceMs < settleMs) return undefined
    this.#running = this.#run()
    return this.#running
  }

  async #run(): Promise<void> {
    this.#sinceBytes = 0
    try {
      await this.#settle()
    } finally {
      this.#running = undefined
      this.#sinceMs = performance.now()
    }
  }
}
