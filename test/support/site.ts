// A user's machine for end-to-end tests: a folder with images, a repository and a home, a real daemon on that home, and the
// command as processes of its own. `refuses` is what every bad input must get: one line that says what is wrong, the right
// exit status, and nothing on standard output.

import assert from 'node:assert/strict'
import { type ChildProcess, spawn } from 'node:child_process'
import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import type { JobReply } from '../../src/api/schema.ts'
import { ChildDaemon, type ChildDaemonOptions } from '../../src/cli/demo/child-daemon.ts'
import { connectNbd, type NbdClient } from '../../src/nbd/client.ts'
import { peer, type Outcome } from './peer.ts'

const ROOT = path.resolve(import.meta.dirname, '..', '..')
const MAIN = path.join(ROOT, 'src', 'cli', 'main.ts')
// Commands are started by the hundred: from compiled code each takes half the time.
process.env['NODE_COMPILE_CACHE'] ??= path.join(ROOT, 'node_modules', '.cache', 'varve-tests')
const COMMAND_MS = 60_000

export const MIB = 1024 * 1024

/** For node:test's `skip` option. */
export const notRoot: string | false = process.getuid?.() === 0 ? false : 'it takes root'

/** Exit statuses of the command. */
export const STATUS = { done: 0, failed: 1, usage: 2, notFound: 3, busy: 4, corrupt: 5 } as const

export interface Running {
  readonly child: ChildProcess
  readonly ended: Promise<Outcome & { readonly signal: NodeJS.Signals | null }>
  /** What it said on standard error so far. */
  stderr(): string
}

/** Waits until a command has said on standard error what matches: it may still be on its way to the daemon when a job of its already waits. */
export async function saysSoon(running: Running, pattern: RegExp): Promise<void> {
  while (!pattern.test(running.stderr())) {
    const { exitCode, signalCode } = running.child
    assert.ok(exitCode === null && signalCode === null, `it ended, and did not say ${pattern}: ${running.stderr()}`)
    await sleep(20)
  }
}

export class Site {
  readonly folder: string
  readonly home: string
  readonly repository: string
  readonly daemon: ChildDaemon
  readonly #mounts: string[] = []

  private constructor(folder: string, options: ChildDaemonOptions) {
    this.folder = folder
    this.home = path.join(folder, 'home')
    this.repository = path.join(folder, 'repository')
    this.daemon = new ChildDaemon(this.home, path.join(folder, 'daemon.log'), options)
  }

  /** A new folder, short enough for sockets; the daemon does not run yet. */
  static make(options: ChildDaemonOptions = {}): Site {
    const root = process.env['VARVE_TEST_DIR'] ?? os.tmpdir()
    return new Site(fs.mkdtempSync(path.join(root, 'varve-site-')), options)
  }

  /** The same with a running daemon and an empty repository. */
  static async start(options: ChildDaemonOptions = {}): Promise<Site> {
    const site = Site.make(options)
    await site.daemon.start()
    await site.done('repo', 'init', site.repository)
    return site
  }

  async end(): Promise<void> {
    await this.daemon.kill()
    for (const folder of this.#mounts) peer('umount', folder)
    fs.rmSync(this.folder, { recursive: true, force: true })
  }

  path(...names: string[]): string {
    return path.join(this.folder, ...names)
  }

  /** Mounts a file system of `mib` MiB on a folder of the site, which is made; it takes root. Call again to resize it. */
  smallFileSystem(folder: string, mib: number): void {
    if (this.#mounts.includes(folder)) {
      peer('mount', '-o', `remount,size=${mib}m`, folder)
      return
    }
    fs.mkdirSync(folder)
    peer('mount', '-t', 'tmpfs', '-o', `size=${mib}m`, 'tmpfs', folder)
    this.#mounts.push(folder)
  }

  /** What the daemon said. */
  log(): string {
    return fs.readFileSync(this.path('daemon.log'), 'utf8')
  }

  /** Begins a command, on this home unless the arguments name another. */
  begin(...args: string[]): Running {
    const home = args.includes('--home') ? [] : ['--home', this.home]
    return beginCommand([...args, ...home])
  }

  /** Runs a command to its end. */
  async varve(...args: string[]): Promise<Outcome> {
    return this.begin(...args).ended
  }

  /** Runs a command that must succeed; returns its standard output without the line's end. */
  async done(...args: string[]): Promise<string> {
    const { status, stdout, stderr } = await this.varve(...args)
    assert.equal(status, STATUS.done, `varve ${args.join(' ')}: exit ${status}: ${stderr}`)
    return stdout.trimEnd()
  }

  /** Runs a command that must fail with this status and one line that matches; returns the line. */
  async refuses(args: readonly string[], status: number, says: RegExp): Promise<string> {
    return checkRefusal(args, await this.varve(...args), status, says)
  }

  /** Makes an image with qemu-img in the site's folder; returns its path. */
  image(name: string, size: string, ...options: string[]): string {
    const image = this.path(name)
    peer('qemu-img', 'create', '-q', '-f', name.endsWith('.raw') ? 'raw' : 'qcow2', ...options, image, size)
    return image
  }

  /** Makes a disk of that size with the command. */
  async disk(name: string, size: string, format: 'qcow2' | 'raw' = 'qcow2', folder = this.folder): Promise<string> {
    const image = path.join(folder, `${name}.${format}`)
    await this.done('disk', 'create', name, image, '-f', format, '--size', size)
    return image
  }

  /** A guest of a disk; close it. */
  async guest(disk: string): Promise<NbdClient> {
    const { uri } = await this.daemon.api.call('showDisk', { disk }, {})
    assert.ok(uri !== undefined, `disk ${disk} is served`)
    return connectNbd(uri)
  }

  /** Waits until a job is as wanted; fails when it ends otherwise. */
  async job(id: string, test: (status: JobReply) => boolean): Promise<JobReply> {
    const deadline = performance.now() + COMMAND_MS
    for (;;) {
      const status = await this.daemon.api.call('showJob', { job: id }, {})
      if (test(status)) return status
      assert.ok(status.endedMs === undefined, `job ${id} ended: ${JSON.stringify(status)}`)
      assert.ok(performance.now() < deadline, `job ${id} stays: ${JSON.stringify(status)}`)
      await new Promise((resolve) => setTimeout(resolve, 20))
    }
  }

  /** Waits until so many jobs run or wait; returns those that do. */
  async running(count = 1): Promise<readonly JobReply[]> {
    const deadline = performance.now() + COMMAND_MS
    for (;;) {
      const jobs = await this.daemon.api.call('listJobs', {}, {})
      const running = jobs.filter(({ endedMs }) => endedMs === undefined)
      if (running.length >= count) return running
      assert.ok(performance.now() < deadline, 'a job runs')
      await new Promise((resolve) => setTimeout(resolve, 20))
    }
  }

  /** What the daemon has, to compare before and after: disks with their layers, and how many jobs there were. */
  async state(): Promise<unknown> {
    const disks = await this.daemon.api.call('listDisks', {}, {})
    const jobs = await this.daemon.api.call('listJobs', {}, {})
    return {
      disks: disks.map(({ bitmaps: _bitmaps, pauses: _pauses, ...rest }) => rest),
      jobs: jobs.map(({ id, state }) => [id, state]),
    }
  }
}

/** Begins the command with these arguments alone. */
export function beginCommand(args: readonly string[], options: { readonly user?: number } = {}): Running {
  const { user } = options
  const child = spawn(process.execPath, [MAIN, ...args], {
    stdio: ['ignore', 'pipe', 'pipe'],
    timeout: COMMAND_MS,
    ...(user === undefined ? {} : { uid: user, gid: user }),
  })
  let stdout = ''
  let stderr = ''
  child.stdout.on('data', (data: Buffer) => (stdout += data.toString()))
  child.stderr.on('data', (data: Buffer) => (stderr += data.toString()))
  const ended = new Promise<Outcome & { signal: NodeJS.Signals | null }>((resolve) =>
    child.once('close', (status, signal) => resolve({ status: status ?? -1, signal, stdout, stderr })),
  )
  return { child, ended, stderr: () => stderr }
}

/** Checks that a command failed as bad input must: by this status, with one line that matches and nothing else. */
export function checkRefusal(args: readonly string[], outcome: Outcome, status: number, says: RegExp): string {
  const note = `varve ${args.join(' ')}: exit ${outcome.status}: ${outcome.stdout}${outcome.stderr}`
  assert.equal(outcome.status, status, note)
  assert.match(outcome.stderr, says, note)
  assert.match(outcome.stderr, /^[^\n]+\n$/, `one line: ${note}`)
  assert.equal(outcome.stdout, '', note)
  return outcome.stderr.trimEnd()
}
