import assert from 'node:assert/strict'
import { type ChildProcess, spawn } from 'node:child_process'
import fs from 'node:fs'
import path from 'node:path'
import { type TestContext, test } from 'node:test'
import { missing } from '../../test/support/peer.ts'
import { tempFolder } from '../../test/support/temp.ts'
import { describeHolders, findHolders } from './holders.ts'

/** A process that has the file open, and maybe a lock on it; resolves when it does. */
async function holder(t: TestContext, file: string, isLocked: boolean): Promise<ChildProcess> {
  const hold = 'echo open; exec sleep 60'
  const script = isLocked ? `exec 9<"$1"; flock -s 9; ${hold}` : `exec 9<"$1"; ${hold}`
  const child = spawn('sh', ['-c', script, 'sh', file], { stdio: ['ignore', 'pipe', 'ignore'] })
  t.after(() => child.kill('SIGKILL'))
  await new Promise((resolve) => child.stdout?.once('data', resolve))
  return child
}

function makeFile(t: TestContext): string {
  const file = path.join(tempFolder(t), 'image')
  fs.writeFileSync(file, 'text')
  return file
}

test('whoever has a file open is found by pid and name, by whatever path', async (t) => {
  const file = makeFile(t)
  assert.deepEqual(findHolders(file), [])
  const child = await holder(t, file, false)
  const link = `${file}-link`
  fs.symlinkSync(file, link)
  for (const name of [file, link]) {
    const found = findHolders(name)
    assert.deepEqual(
      found.map(({ pid }) => pid),
      [child.pid],
    )
  }
  assert.match(describeHolders(findHolders(file)), new RegExp(`^(sh|sleep) \\(pid ${child.pid}\\)$`))
})

test('where somebody holds a lock, those who have the file merely open are left out', {
  skip: missing('flock'),
}, async (t) => {
  const file = makeFile(t)
  await holder(t, file, false)
  const locker = await holder(t, file, true)
  assert.deepEqual(
    findHolders(file).map(({ pid }) => pid),
    [locker.pid],
  )
})

test('nobody holds a file that is not there, and the process itself does not count', (t) => {
  const file = makeFile(t)
  const descriptor = fs.openSync(file, 'r')
  t.after(() => fs.closeSync(descriptor))
  assert.deepEqual(findHolders(file), [])
  assert.deepEqual(findHolders(`${file}-none`), [])
  assert.equal(describeHolders([]), 'another process')
})
