// A disk of 64 TiB, 2^30 clusters, in a sparse qcow2 image: created, written at random places, checked and mapped from end to end
// in a process that never takes 500 MB.

import assert from 'node:assert/strict'
import { spawnSync } from 'node:child_process'
import path from 'node:path'
import { test } from 'node:test'
import { seedOfRun } from '../../src/base/random.ts'
import type { HugeReport } from '../support/huge-image.ts'
import { hasProgram, peer } from '../support/peer.ts'
import { tempFolder } from '../support/temp.ts'

const WRITES = 10_000
const MEMORY_MAX_MIB = 476 // 500 MB

test('a disk of 2^30 clusters is written, checked and mapped within 500 MB', (t) => {
  const seed = seedOfRun()
  const file = path.join(tempFolder(t), 'huge.qcow2')
  const script = path.resolve(import.meta.dirname, '../support/huge-image.ts')
  const child = spawnSync(process.execPath, [script, file, String(WRITES), String(seed)], { encoding: 'utf8' })
  assert.equal(child.status, 0, `seed ${seed}: ${child.stderr}`)
  const report = JSON.parse(child.stdout) as HugeReport
  t.diagnostic(
    `seed ${seed}, peak ${report.peakMiB} MiB, file ${report.fileMiB} MiB, ${JSON.stringify(report.seconds)}`,
  )
  assert.ok(report.peakMiB < MEMORY_MAX_MIB, `${report.peakMiB} MiB`)
  assert.deepEqual([report.corruptions, report.leaks], [0, 0])
  assert.equal(report.mappedBytes, 2 ** 46)
  assert.ok(report.dataExtents <= report.allocatedClusters)
  assert.ok(report.allocatedClusters > WRITES * 0.99)
  if (hasProgram('qemu-img')) peer('qemu-img', 'check', '-f', 'qcow2', file)
  else t.diagnostic('qemu-img is not installed')
})
