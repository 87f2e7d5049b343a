// A real `varve serve` for one test, the command line as processes beside it, and what QEMU's tools say of the images. No
// process outlives the test: not when it fails, and not when the runner ends it.

import assert from 'node:assert/strict'
import path from 'node:path'
import type { TestContext } from 'node:test'
import { ChildDaemon } from '../../src/cli/demo/child-daemon.ts'
import { peer, runPeer } from './peer.ts'
import { tempFolder } from './temp.ts'

const MAIN = path.resolve(import.meta.dirname, '..', '..', 'src', 'cli', 'main.ts')

// A runner that loses patience sends SIGTERM; only an orderly exit takes the daemon along.
process.once('SIGTERM', () => process.exit(143))

export interface TestDaemon {
  readonly daemon: ChildDaemon
  /** The test's own; the daemon's home and log are in it. */
  readonly folder: string
  /** Runs a command of the command line that must succeed; returns its standard output. */
  readonly varve: (...args: string[]) => string
}

/** Starts a daemon in a new folder. After the test it is killed, if it still runs, and the folder removed. */
export async function startDaemon(t: TestContext): Promise<TestDaemon> {
  const started: ChildDaemon[] = []
  // Hooks run in the order of their registration: the daemon ends before its folder is removed.
  t.after(() => started[0]?.kill())
  const folder = tempFolder(t)
  const home = path.join(folder, 'home')
  const daemon = new ChildDaemon(home, path.join(folder, 'daemon.log'))
  started.push(daemon)
  await daemon.start()
  return { daemon, folder, varve: (...args) => peer(process.execPath, MAIN, '--home', home, ...args) }
}

/** What `qemu-img check` says of a qcow2 image. */
export interface ImageCheck {
  /** Errors, leaked clusters, and what could not be checked. */
  readonly corruptions: number
  readonly leaks: number
  readonly checkErrors: number
  /** A line for each. */
  readonly findings: readonly string[]
}

/** Undefined when QEMU cannot open the image at all. */
export function checkImage(image: string): ImageCheck | undefined {
  const { stdout, stderr } = runPeer('qemu-img', ['check', '--output=json', '-f', 'qcow2', image])
  if (!stdout.startsWith('{')) return undefined
  const said = JSON.parse(stdout) as Record<string, number | undefined>
  return {
    corruptions: said['corruptions'] ?? 0,
    leaks: said['leaks'] ?? 0,
    checkErrors: said['check-errors'] ?? 0,
    findings: stderr.split('\n').filter((line) => line !== ''),
  }
}

/** Fails unless `qemu-img check` finds no error and no leak in the image. */
export function assertClean(image: string, note: string): void {
  const clean: ImageCheck = { corruptions: 0, leaks: 0, checkErrors: 0, findings: [] }
  assert.deepEqual(checkImage(image), clean, `${note}: qemu-img check ${image}`)
}
