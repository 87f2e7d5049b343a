// The programs that Varve is tested against: qemu-img and its like. A test that needs one that is not installed skips and
// says so; under CI the runner counts that as a failure.

import { spawnSync } from 'node:child_process'

export function hasProgram(name: string): boolean {
  return spawnSync('sh', ['-c', `command -v ${name}`]).status === 0
}

/** For node:test's `skip` option: false when all programs are there, else which one is missing. */
export function missing(...names: string[]): string | false {
  const absent = names.filter((name) => !hasProgram(name))
  return absent.length === 0 ? false : `${absent.join(', ')} not installed`
}

export interface Outcome {
  readonly status: number
  readonly stdout: string
  readonly stderr: string
}

/** Runs a program to its end and returns what it said. */
export function runPeer(program: string, args: readonly string[], input?: string): Outcome {
  const result = spawnSync(program, args, { encoding: 'utf8', input, maxBuffer: 256 * 1024 * 1024, timeout: 600_000 })
  if (result.error !== undefined) throw result.error
  return { status: result.status ?? -1, stdout: result.stdout, stderr: result.stderr }
}

/** Runs a program that must succeed; returns its standard output. */
export function peer(program: string, ...args: string[]): string {
  const outcome = runPeer(program, args)
  if (outcome.status !== 0) {
    throw new Error(`${program} ${args.join(' ')}: exit ${outcome.status}\n${outcome.stdout}${outcome.stderr}`)
  }
  return outcome.stdout
}
