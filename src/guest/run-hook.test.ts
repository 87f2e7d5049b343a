import assert from 'node:assert/strict'
import fs from 'node:fs'
import path from 'node:path'
import { test } from 'node:test'
import { isBlockError } from '../block/error.ts'
import { tempFolder } from '../../test/support/temp.ts'
import { runHook } from './run-hook.ts'

const never = new AbortController().signal

test('a command runs by the shell and knows the machine', async (t) => {
  const file = path.join(tempFolder(t), 'said')
  await runHook(`echo "$VARVE_MACHINE froze" > ${file}`, 'vm1', never)
  assert.equal(fs.readFileSync(file, 'utf8'), 'vm1 froze\n')
})

test('a command that fails says why', async () => {
  await assert.rejects(
    runHook('echo no guest >&2; exit 3', 'vm1', never),
    (error) => isBlockError(error, 'io') && error.message.endsWith('ended with status 3: no guest'),
  )
  await assert.rejects(runHook('/nowhere/command', 'vm1', never), (error) => isBlockError(error, 'io'))
})

test('a command whose time is over ends with all that it started', async (t) => {
  const file = path.join(tempFolder(t), 'pid')
  const patience = new AbortController()
  const run = runHook(`sleep 1000 & echo $! > ${file}; wait`, 'vm1', patience.signal)
  run.catch(() => undefined)
  while (!fs.existsSync(file) || fs.readFileSync(file, 'utf8') === '') await new Promise(setImmediate)
  patience.abort()
  await assert.rejects(run, (error) => isBlockError(error, 'timeout'))
  const pid = Number(fs.readFileSync(file, 'utf8'))
  // Gone, or dead and not yet waited for by whoever inherited it.
  const isAlive = (): boolean => {
    try {
      return !/^State:\s+Z/m.test(fs.readFileSync(`/proc/${pid}/status`, 'utf8'))
    } catch {
      return false
    }
  }
  while (isAlive()) await new Promise((resolve) => setTimeout(resolve, 5))
})

test('what a command leaves running does not hold it up', async (t) => {
  const file = path.join(tempFolder(t), 'pid')
  await runHook(`sleep 1000 & echo $! > ${file}`, 'vm1', never)
  process.kill(Number(fs.readFileSync(file, 'utf8')), 'SIGKILL')
})
