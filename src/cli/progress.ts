// Progress of long work on standard error: a bar on a terminal, nothing elsewhere, where the bar's package is not even loaded.

import { formatSize } from '../base/size.ts'

const SingleBar = process.stderr.isTTY ? (await import('cli-progress')).SingleBar : undefined

export class Progress {
  readonly #bar: InstanceType<NonNullable<typeof SingleBar>> | undefined

  readonly #show: (amount: number) => string

  /** `show` says an amount; bytes unless told. */
  constructor(title: string, show: (amount: number) => string = formatSize) {
    this.#show = show
    if (SingleBar === undefined) return
    const format = `${title} [{bar}] {percentage}% {done} of {all} {eta_formatted}`
    this.#bar = new SingleBar({ format, hideCursor: true, stream: process.stderr, etaBuffer: 50 })
    this.#bar.start(1, 0, { done: '', all: '' })
  }

  update(done: number, total: number): void {
    this.#bar?.setTotal(Math.max(1, total))
    this.#bar?.update(done, { done: this.#show(done), all: this.#show(total) })
  }

  end(): void {
    this.#bar?.stop()
  }
}

/** How long a job that copies has still to go. */
export function restOf(restMs: number | undefined): string {
  return restMs === undefined ? 'no end in sight yet' : `about ${Math.ceil(restMs / 1000)} s to go`
}
