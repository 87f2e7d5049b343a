// How the demo shows itself: a line per event with its time, a bar per job on a terminal, and the table at the end. With
// --json the lines go to standard error and the table is data.

import { formatSize } from '../../base/size.ts'
import { table } from '../context.ts'
import { Progress } from '../progress.ts'
import type { PhaseFigures } from './load.ts'

export interface Phase extends PhaseFigures {
  readonly name: string
  /** Bytes that the job of this phase read or copied. */
  readonly copiedBytes?: number | undefined
  /** Most scratch in use at one time. */
  readonly scratchPeak?: number | undefined
  /** What the repository grew by. */
  readonly storedBytes?: number | undefined
}

export class Timeline {
  readonly #start = performance.now()
  readonly #stream: NodeJS.WriteStream

  constructor(json: boolean) {
    this.#stream = json ? process.stderr : process.stdout
  }

  say(text: string): void {
    const seconds = ((performance.now() - this.#start) / 1000).toFixed(1).padStart(6)
    this.#stream.write(`${seconds} s  ${text}\n`)
  }

  bar(title: string): Progress {
    return new Progress(`          ${title}`)
  }
}

export function phaseTable(phases: readonly Phase[]): string {
  const size = (bytes: number | undefined): string => (bytes === undefined ? '' : formatSize(bytes))
  return table(
    ['PHASE', 'SECONDS', 'OPS/S', 'P99 MS', 'WORST MS', 'COPIED', 'SCRATCH PEAK', 'STORED'],
    phases.map((phase) => [
      phase.name,
      phase.seconds.toFixed(1),
      ...(phase.operations === 0
        ? ['', '', '']
        : [phase.perSecond.toFixed(0), phase.p99Ms.toFixed(2), phase.worstMs.toFixed(1)]),
      size(phase.copiedBytes),
      size(phase.scratchPeak),
      size(phase.storedBytes),
    ]),
  )
}
