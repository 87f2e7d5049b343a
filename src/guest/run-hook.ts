// Runs a command that the user gave, by the shell, with the machine's name in VARVE_MACHINE. When its time is over it is killed with all
// that it started.

import { spawn } from 'node:child_process'
import { HOOK_OUTPUT_MAX } from '../base/limits.ts'
import { BlockError, toBlockError } from '../block/error.ts'

/** Resolves when it ended with status 0. Kinds 'timeout', 'io' with what it said. */
export async function runHook(command: string, machine: string, signal: AbortSignal): Promise<void> {
  if (signal.aborted) throw tooLong(command)
  // A group of its own: what the shell started ends with it.
  const child = spawn('/bin/sh', ['-c', command], {
    stdio: ['ignore', 'ignore', 'pipe'],
    detached: true,
    env: { ...process.env, VARVE_MACHINE: machine },
  })
  let said = ''
  child.stderr.setEncoding('utf8')
  child.stderr.on('data', (text: string) => (said = (said + text).slice(-HOOK_OUTPUT_MAX)))
  const kill = (): void => {
    try {
      if (child.pid !== undefined) process.kill(-child.pid, 'SIGKILL')
    } catch {
      // It ended just now.
    }
  }
  signal.addEventListener('abort', kill)
  try {
    // Its end, not that of its output, which what it left in the background may hold open.
    const { status, ended } = await new Promise<{ status: number | null; ended: NodeJS.Signals | null }>(
      (resolve, reject) => {
        child.once('error', reject)
        child.once('exit', (code, by) => resolve({ status: code, ended: by }))
      },
    )
    if (signal.aborted) throw tooLong(command)
    if (status === 0) return
    const how = status === null ? `was ended by ${ended}` : `ended with status ${status}`
    const why = said.trim().replaceAll(/\s*\n\s*/g, '; ')
    throw new BlockError('io', `the command ${JSON.stringify(command)} ${how}${why === '' ? '' : `: ${why}`}`)
  } catch (error) {
    throw toBlockError(error, `the command ${JSON.stringify(command)}`)
  } finally {
    signal.removeEventListener('abort', kill)
    child.stderr.destroy()
  }
}

function tooLong(command: string): BlockError {
  return new BlockError('timeout', `the command ${JSON.stringify(command)} took too long and was killed`)
}
