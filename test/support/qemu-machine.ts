// A machine of QEMU's for tests, without a guest in it: its processors never run, so it is there in a fraction of a second, and what a guest
// would do to its disks a test does through the same devices, by the human monitor's qemu-io. Its monitor answers at `qmp`.

import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import path from 'node:path'
import type { TestContext } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import { isBlockError } from '../../src/block/error.ts'
import { QmpClient } from '../../src/source/qemu/qmp-client.ts'
import { tempFolder } from './temp.ts'

const PATIENCE_MS = 30_000

export interface MachineDisk {
  /** Of the device. */
  readonly id: string
  readonly file: string
  readonly format: 'raw' | 'qcow2'
  readonly readOnly?: boolean
}

export class QemuMachine {
  readonly qmp: string
  readonly #child: ChildProcess

  private constructor(qmp: string, child: ChildProcess) {
    this.qmp = qmp
    this.#child = child
  }

  /** With these disks as virtio devices, whose nodes are called node-ID. It ends with the test; returns when its monitor answers. */
  static async start(
    t: Pick<TestContext, 'after'>,
    disks: readonly MachineDisk[],
    options: { readonly qmp?: string; readonly args?: readonly string[] } = {},
  ): Promise<QemuMachine> {
    const qmp = options.qmp ?? path.join(tempFolder(t), 'qmp.sock')
    const plain = '-machine pc,accel=tcg -S -m 32 -nodefaults -display none'.split(' ')
    const args = [...plain, ...disks.flatMap(argsOf), '-qmp', `unix:${qmp},server=on,wait=off`, ...(options.args ?? [])]
    const child = spawn('qemu-system-x86_64', args, { stdio: ['ignore', 'ignore', 'inherit'] })
    t.after(() => child.kill('SIGKILL'))
    const machine = new QemuMachine(qmp, child)
    for (const deadline = performance.now() + PATIENCE_MS; ; await sleep(10)) {
      if (child.exitCode !== null) throw new Error(`QEMU ended with status ${child.exitCode}`)
      try {
        await machine.ask('query-status')
        return machine
      } catch (error) {
        if (!isBlockError(error) || performance.now() > deadline) throw error
      }
    }
  }

  get pid(): number {
    return this.#child.pid as number
  }

  /** One command by a connection of its own. */
  async ask(command: string, args: object = {}): Promise<unknown> {
    const client = await QmpClient.open(this.qmp, { greetingMs: PATIENCE_MS })
    try {
      return await client.execute(command, args)
    } finally {
      client.close()
    }
  }

  /** A command of qemu-io as the guest's device would do it, such as "write -P 1 0 64k". */
  async io(disk: string, command: string): Promise<void> {
    const device = `/machine/peripheral/${disk}/virtio-backend`
    const said = await this.ask('human-monitor-command', { 'command-line': `qemu-io -d ${device} "${command}"` })
    // What it did it says on QEMU's own standard output; here only what it could not begin.
    if (String(said).trim() !== '') throw new Error(`qemu-io ${disk} ${command}: ${String(said)}`)
  }

  /** SIGKILL, unless told; `quit` has it end cleanly and save its bitmaps. */
  async stop(how: 'kill' | 'quit' = 'kill'): Promise<void> {
    const ended = once(this.#child, 'exit')
    if (how === 'kill') this.#child.kill('SIGKILL')
    else await this.ask('quit').catch(() => undefined)
    await ended
  }
}

function argsOf({ id, file, format, readOnly = false }: MachineDisk): string[] {
  const node = `driver=${format},node-name=node-${id},read-only=${readOnly ? 'on' : 'off'},file.driver=file,file.filename=${file}`
  return ['-blockdev', node, '-device', `virtio-blk-pci,id=${id},drive=node-${id}`]
}
