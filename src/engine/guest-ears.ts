// How jobs hear what the guests of disks wait for: an ear for the disks of this thread, and one for each disk elsewhere, which whoever has
// the threads provides. The other side of that, for jobs elsewhere that listen to disks here, is `ListenedDisks`.

import type { Disk } from '../chain/disk.ts'
import type { LatencyMeter } from '../chain/latency-meter.ts'
import type { GuestsHeard } from '../job/courtesy.ts'

/** Hears of guests until it is closed. */
export interface GuestEar {
  readonly heard: GuestsHeard
  close(): void
}

/** For the disk of that name in another thread; undefined when nothing can be heard of it. */
export type FarEar = (disk: string) => GuestEar | undefined

/** For disks of this thread. */
export class NearGuests implements GuestEar {
  readonly heard: GuestsHeard
  readonly #disks: readonly Disk[]

  constructor(disks: readonly Disk[]) {
    this.#disks = disks
    const meters = disks.map((disk) => disk.listen())
    this.heard = {
      get answered(): number {
        return meters.reduce((sum, meter) => sum + meter.answered, 0)
      },
      waitedMs: () => meters.reduce((sum, meter) => sum + meter.waitedMs(), 0),
      activeMs,
    }
  }

  close(): void {
    for (const disk of this.#disks) disk.unlisten()
  }
}

/** Disks of this thread that jobs elsewhere listen to, each by the number of its thread. */
export class ListenedDisks {
  readonly #listened = new Map<string, { readonly disk: Disk; readonly meter: LatencyMeter; readonly asker: number }>()

  /** What its guests did since this asker heard of them first. */
  hear(disk: Disk, asker: number): { readonly answered: number; readonly waitedMs: number; readonly activeMs: number } {
    const key = keyOf(disk.name, asker)
    let listened = this.#listened.get(key)
    if (listened?.disk !== disk) this.#listened.set(key, (listened = { disk, meter: disk.listen(), asker }))
    const { meter } = listened
    return { answered: meter.answered, waitedMs: meter.waitedMs(), activeMs: activeMs() }
  }

  leave(disk: string, asker: number): void {
    const key = keyOf(disk, asker)
    this.#listened.get(key)?.disk.unlisten()
    this.#listened.delete(key)
  }

  /** An asker is gone. */
  lost(asker: number): void {
    for (const { disk, asker: by } of this.#listened.values()) if (by === asker) this.leave(disk.name, asker)
  }
}

function keyOf(disk: string, asker: number): string {
  return `${asker} ${disk}`
}

/** Milliseconds that this thread was at work so far. */
function activeMs(): number {
  return performance.eventLoopUtilization().active
}
