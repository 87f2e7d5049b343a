// npm run bench: all benchmarks, one after the other; the arguments go to each. Every one writes its figures to bench/results and
// its part of docs/benchmarks.md.
//
//   npm run bench                the figures that are published
//   npm run bench -- --quick     a first impression, not published
//   node bench/convert.ts        one of them alone

import { spawnSync } from 'node:child_process'
import path from 'node:path'

for (const name of ['nbd.ts', 'convert.ts']) {
  const args = [path.join(import.meta.dirname, name), ...process.argv.slice(2)]
  const { status } = spawnSync(process.execPath, args, { stdio: 'inherit' })
  if (status !== 0) process.exitCode = 1
}
