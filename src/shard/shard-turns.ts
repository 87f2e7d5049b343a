// The turns of backups that shards make: the queue is in the control plane, and what it says of a turn goes to the shard that wants it.
// A shard that dies gives all of its turns back.

import type { BackupQueue, TurnWish } from '../engine/backup-queue.ts'
import type { Seat } from './seat.ts'

export class ShardTurns {
  readonly #queue: BackupQueue
  /** Whose backup it is that has its turn or waits for it, by job. */
  readonly #seats = new Map<string, Seat>()

  constructor(queue: BackupQueue) {
    this.#queue = queue
  }

  /** See Turn. */
  async take(seat: Seat, wish: TurnWish): Promise<void> {
    if (seat.shard === undefined) return
    const { remote } = seat.shard.calls
    this.#seats.set(wish.id, seat)
    await this.#queue.take(wish, {
      waits: (reason) => void remote.turnWaits(wish.id, reason).catch(() => undefined),
      over: ({ message }) => void remote.turnOver(wish.id, message).catch(() => undefined),
    })
  }

  give(id: string): void {
    this.#seats.delete(id)
    this.#queue.give(id)
  }

  /** The shard is gone. */
  lost(seat: Seat): void {
    for (const [id, holder] of this.#seats) if (holder === seat) this.give(id)
  }
}
