// kill -9 in the middle of active commits under load: ten commits killed once each, at ten different moments, and one killed ten times,
// beside one that is left alone. Prints where each kill found the job, where it went on, and what was copied in all.
//
//   node test/e2e/run-kills.ts --size 4096 --folder DIR     MiB of the disk, and where it lies; the folder for temporary files unless told

import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { parseArgs } from 'node:util'
import { type CommitFigures, type Kill, KilledCommits } from './killed-commits.ts'

const MIB = 1024 * 1024
const TIMES = 10
/** More than this of what one commit copies that is left alone is too much. */
const RATIO_MAX = 1.1

const { values } = parseArgs({
  options: {
    size: { type: 'string', default: '4096' },
    folder: { type: 'string', default: os.tmpdir() },
    iops: { type: 'string', default: '5000' },
    seed: { type: 'string', default: '1' },
  },
})

const mib = (bytes: number): string => (bytes / MIB).toFixed(0)
/** What a commit had to copy but for its guests. */
const own = ({ copied, rewritten }: CommitFigures): number => copied - rewritten
const moments = Array.from({ length: TIMES }, (_, index) => (index + 0.5) / TIMES)

function tell({ stoppedAt, wentOnFrom, total, rewritten }: Kill): void {
  const part = ((stoppedAt / total) * 100).toFixed(0)
  const stopped = `${mib(stoppedAt)} of ${mib(total)} MiB (${part} %; ${mib(rewritten)} again for the guests)`
  console.log(`    killed at ${stopped}, went on from ${mib(wentOnFrom)} MiB`)
}

const folder = fs.mkdtempSync(path.join(values.folder, 'varve-kills-'))
const commits = new KilledCommits({
  folder,
  sizeMiB: Number(values.size),
  seed: Number(values.seed),
  fioIops: Number(values.iops),
})
let isGood = true
try {
  await commits.start()
  const plans = [
    { title: 'left alone', killAt: [] },
    ...moments.map((moment) => ({ title: 'killed once', killAt: [moment] })),
    { title: `killed ${TIMES} times`, killAt: moments },
  ]
  let alone: number | undefined
  for (const { title, killAt } of plans) {
    console.log(`commit, ${title}:`)
    const figures = await commits.commit(killAt, 0, tell)
    alone ??= own(figures)
    const ratio = own(figures) / alone
    if (ratio > RATIO_MAX || figures.kills.length < killAt.length) isGood = false
    const { copied, rewritten, seconds } = figures
    console.log(
      `    ${mib(copied)} MiB copied, ${mib(rewritten)} of them since guests wrote there: ${ratio.toFixed(3)} of one left alone; ${seconds.toFixed(1)} s`,
    )
  }
  await commits.checkImage()
  console.log(isGood ? 'all as it must be' : 'NOT as it must be')
} finally {
  await commits.end()
  fs.rmSync(folder, { recursive: true, force: true })
}
process.exitCode = isGood ? 0 : 1
