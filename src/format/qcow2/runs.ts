// Lists of runs of neighbouring clusters, for who keeps account of many of them.

export interface Run {
  start: number
  count: number
}

/** The runs in order, neighbours as one: few large holes in place of many small ones. */
export function joined(runs: Run[]): Run[] {
  const result: Run[] = []
  for (const run of runs.sort((a, b) => a.start - b.start)) {
    const last = result.at(-1)
    if (last !== undefined && last.start + last.count === run.start) last.count += run.count
    else result.push(run)
  }
  return result
}

/** Takes up to `most` clusters from the beginning of the list. */
export function takeSome(runs: Run[], most: number): Run[] {
  const taken: Run[] = []
  for (let left = most; left > 0 && runs.length > 0; ) {
    const run = runs[0] as Run
    const count = Math.min(left, run.count)
    taken.push({ start: run.start, count })
    left -= count
    run.start += count
    run.count -= count
    if (run.count === 0) runs.shift()
  }
  return taken
}

/** Takes `count` neighbouring clusters from the last run that has so many; gives the first, -1 when there is none. */
export function takePiece(runs: Run[], count: number): number {
  const index = runs.findLastIndex((run) => run.count >= count)
  const run = runs[index]
  if (run === undefined) return -1
  const first = run.start
  run.start += count
  run.count -= count
  if (run.count === 0) runs.splice(index, 1)
  return first
}
