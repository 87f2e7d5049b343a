// The demo as a user runs it: it must end with everything equal, having done each part of the main job.

import assert from 'node:assert/strict'
import { spawnSync } from 'node:child_process'
import fs from 'node:fs'
import path from 'node:path'
import { test } from 'node:test'
import { tempFolder } from '../support/temp.ts'

const MAIN = path.resolve(import.meta.dirname, '../../src/cli/main.ts')

interface Report {
  readonly verdict: string
  readonly failures: readonly string[]
  readonly merge: { readonly killedAt: number; readonly resumedAt: number; readonly total: number }
  readonly backups: readonly { readonly title: string; readonly kind: string; readonly readBytes: number }[]
  readonly phases: readonly { readonly name: string; readonly operations: number }[]
}

test('varve demo ends with everything equal and leaves its files only where it is told to', {
  timeout: 300_000,
}, (t) => {
  const folder = path.join(tempFolder(t), 'kept')
  const ran = spawnSync(process.execPath, [MAIN, 'demo', '--json', '--keep', folder], {
    encoding: 'utf8',
    timeout: 240_000,
  })
  assert.equal(ran.status, 0, ran.stderr)
  const report = JSON.parse(ran.stdout) as Report
  assert.equal(report.verdict, 'demo: everything compared equal')
  assert.deepEqual(report.failures, [])
  const { killedAt, resumedAt, total } = report.merge
  assert.ok(killedAt > 0 && resumedAt > 0 && resumedAt <= killedAt && killedAt < total, JSON.stringify(report.merge))
  assert.deepEqual(
    report.backups.map(({ kind }) => kind),
    ['full', 'incremental', 'incremental', 'incremental'],
  )
  const [full, , afterKill] = report.backups
  assert.ok(full !== undefined && afterKill !== undefined && afterKill.readBytes < full.readBytes / 4)
  assert.ok(fs.existsSync(path.join(folder, 'vm1.qcow2')))
})
