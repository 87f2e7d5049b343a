// A folder of its own for one test, removed after it.

import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import type { TestContext } from 'node:test'

export function tempFolder(t: Pick<TestContext, 'after'>): string {
  const folder = fs.mkdtempSync(path.join(process.env['VARVE_TEST_DIR'] ?? os.tmpdir(), 'varve-test-'))
  t.after(() => fs.rmSync(folder, { recursive: true, force: true }))
  return folder
}
