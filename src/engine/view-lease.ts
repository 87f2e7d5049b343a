// The lease of a view: ends it when nobody has asked it for anything for too long, or when it broke. A reader that is connected and silent
// counts as gone: a process that hangs keeps its connection for ever, and scratch grows meanwhile.

import { VIEW_LOOK_MS } from '../base/limits.ts'
import { BlockError } from '../block/error.ts'
import type { BackupDisk } from '../job/backup.ts'

export class ViewLease {
  readonly #ms: number
  readonly #disks: readonly BackupDisk[]
  readonly giveUp: (error: BlockError) => void
  #readers = 0
  /** When it was asked for something last, in milliseconds. */
  #touchedMs = performance.now()
  #over: NodeJS.Timeout | undefined
  #look: NodeJS.Timeout | undefined

  /** `giveUp` ends the view. */
  constructor(ms: number, disks: readonly BackupDisk[], giveUp: (error: BlockError) => void) {
    this.#ms = ms
    this.#disks = disks
    this.giveUp = giveUp
  }

  /** Somebody is connected. */
  get isRead(): boolean {
    return this.#readers > 0
  }

  begin(): void {
    this.#look = setInterval(() => {
      const broken = this.#disks.find(({ view }) => view.broken !== undefined)?.view.broken
      if (broken !== undefined) this.giveUp(broken)
    }, VIEW_LOOK_MS).unref()
    this.touch()
    this.#wait(this.#ms)
  }

  enter(): void {
    this.#readers++
    this.touch()
  }

  leave(): void {
    this.#readers--
    this.touch()
  }

  /** It was asked for something. */
  touch(): void {
    this.#touchedMs = performance.now()
  }

  end(): void {
    clearInterval(this.#look)
    clearTimeout(this.#over)
  }

  #wait(ms: number): void {
    this.#over = setTimeout(() => {
      const leftMs = this.#touchedMs + this.#ms - performance.now()
      if (leftMs > 0) return this.#wait(leftMs)
      const message = `nobody read the view for ${this.#ms} ms: it has ended and its bits are back`
      this.giveUp(new BlockError('timeout', message))
    }, ms).unref()
  }
}
