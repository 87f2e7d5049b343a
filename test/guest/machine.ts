// A real guest: Linux with init.sh as its only program, run by QEMU in software emulation on a PC, whose disks can come and go. It keeps journals on its disks, says which
// lines it has synced, and runs what it is told. Nothing here waits for a time: only for what the guest says.

import { type ChildProcess, spawn } from 'node:child_process'
import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { findKernel, makeInitramfs } from './kernel.ts'

/**
 * For how many seconds a guest may say nothing while something is waited for, also while it boots; and how often a boot is tried. They are counted
 * while this process runs: one that is stopped together with its guest has not waited.
 */
const SILENCE = 120
const BOOT_SILENCE = 30
const BOOTS_MAX = 3
/** As much of the console is in messages, in characters. */
const LAST_SAID = 4000
/** What a system on a disk shows when it takes commands. */
const PROMPT = /guest:\/# $/

export interface GuestDisk {
  /** Of its node and device in QEMU, and in the guest, where it is /disks/NAME: letters, digits, hyphens; at most 20. */
  readonly name: string
  /** Its `-blockdev` without `node-name`. */
  readonly blockdev: string
}

export interface GuestOptions {
  readonly disks: readonly GuestDisk[]
  /** Where the monitor listens for QMP: the path of a Unix socket. */
  readonly qmp?: string
  /** Where the guest's agent listens, which knows guest-sync-delimited, guest-ping and guest-fsfreeze-*: the path of a Unix socket. */
  readonly agent?: string
  /** Where the memory of a running guest comes from, and which; then nothing boots, and `boot` does not wait. */
  readonly incoming?: { readonly uri: string; readonly from: GuestMachine }
  /** False for a guest that writes nothing until run('writing=yes'). */
  readonly isWriting?: boolean
  /** True: it has its system on its only disk (makeSystemDisk), and is up when it shows its prompt; `say` types there. */
  readonly hasSystem?: boolean
  /** More arguments for QEMU. */
  readonly args?: readonly string[]
}

/** A disk of a Varve daemon (or of any NBD server) at a Unix socket; requests wait a minute for a server that went away. */
export function nbdDisk(name: string, socket: string, exportName: string = name): GuestDisk {
  return { name, blockdev: `driver=nbd,server.type=unix,server.path=${socket},export=${exportName},reconnect-delay=60` }
}

/** A disk that QEMU opens itself. */
export function fileDisk(name: string, file: string, format: 'raw' | 'qcow2'): GuestDisk {
  const cache = 'cache.direct=off,discard=unmap'
  return { name, blockdev: `driver=${format},${cache},file.driver=file,file.filename=${file}` }
}

/** A running guest. */
export class GuestMachine {
  readonly #process: ChildProcess
  readonly #ended: Promise<void>
  readonly #disks: readonly GuestDisk[]
  #watchers: (() => void)[] = []
  #hasEnded = false
  #asked: number
  /** Everything that the guest and QEMU have said. */
  console = ''

  /**
   * Starts a guest and waits until it is up. Should its kernel hang before it has seen its disks, as on a machine with much else to do it
   * may in the calibration of its clocks, it is booted again.
   */
  static async boot(options: GuestOptions): Promise<GuestMachine> {
    let said = ''
    for (let attempt = 0; attempt < BOOTS_MAX; attempt++) {
      const guest = new GuestMachine(options)
      if (options.incoming !== undefined) return guest
      if (await guest.hears(options.hasSystem === true ? PROMPT : /VARVE up/, BOOT_SILENCE)) return guest
      said = guest.#lastSaid()
      const isCalibration = !guest.#hasEnded && !/Run \/init/.test(guest.console)
      await guest.kill()
      if (!isCalibration) break
    }
    throw new Error(`the guest did not boot:\n${said}`)
  }

  private constructor(options: GuestOptions) {
    this.#disks = options.disks
    // The guest counts the commands that it was told, wherever it is.
    this.#asked = options.incoming === undefined ? 0 : options.incoming.from.#asked
    this.#process = spawn('qemu-system-x86_64', argumentsOf(options), { stdio: ['pipe', 'pipe', 'pipe'] })
    process.once('exit', this.#endWithParent)
    const hear = (chunk: Buffer): void => {
      this.console += chunk.toString('latin1').replaceAll('\r', '')
      this.#wake()
    }
    this.#process.stdout?.on('data', hear)
    this.#process.stderr?.on('data', hear)
    this.#process.stdin?.on('error', () => undefined)
    this.#ended = new Promise((resolve) => {
      this.#process.once('close', () => {
        process.off('exit', this.#endWithParent)
        this.#hasEnded = true
        this.#wake()
        resolve()
      })
    })
  }

  readonly #endWithParent = (): void => void this.#process.kill('SIGKILL')

  /** Of QEMU. */
  get pid(): number {
    return this.#process.pid ?? 0
  }

  /** The highest line that the guest said it has synced, on all its disks. */
  get synced(): number {
    const at = this.console.lastIndexOf('VARVE synced ')
    // The last one may still be on its way.
    const said = [...this.console.slice(Math.max(0, at - 64)).matchAll(/VARVE synced (\d+)\n/g)]
    return Number(said.at(-1)?.[1] ?? 0)
  }

  /** Waits until `count` more lines are synced, and returns the number of the last. */
  async progress(count: number): Promise<number> {
    const target = this.synced + count
    await this.#until(() => this.synced >= target, `line ${target}`)
    return this.synced
  }

  /**
   * Runs a line of shell between two lines of the journal and returns what it printed; it must succeed. Functions of init.sh are at hand:
   * `use` (disks that came), `leave NAME` (before one goes), and the variable `writing` (yes or no).
   */
  async run(command: string): Promise<string> {
    const number = ++this.#asked
    this.#process.stdin?.write(`${command}\n`)
    const answer = new RegExp(`VARVE begins ${number}\\n([^]*?)VARVE did ${number} (\\d+)\\n`)
    await this.#until(() => answer.test(this.console), `an answer to '${command}'`)
    const [, output = '', status] = answer.exec(this.console) ?? []
    if (status !== '0') throw new Error(`the guest's '${command}' failed with ${status}: ${output}`)
    return output
  }

  /** Types a line at the prompt of a guest with a system, and returns what is shown until the next prompt. */
  async say(line: string): Promise<string> {
    const from = this.console.length
    this.#process.stdin?.write(`${line}\n`)
    await this.#until(() => PROMPT.test(this.console.slice(from)), `an answer to '${line}'`)
    return this.console.slice(from).replace(PROMPT, '')
  }

  /** Has the guest read everything from its disks again and compare it with what it wrote. */
  async check(): Promise<void> {
    await this.run('check')
    const complaints = await this.run('complaints || true')
    if (complaints !== '' || /VARVE failed/.test(this.console)) {
      throw new Error(`the guest's kernel complains:\n${complaints}\n${this.#lastSaid()}`)
    }
  }

  /** Has the guest unmount its disks and switch itself off. */
  async finish(): Promise<void> {
    this.#process.stdin?.write('finish\n')
    await this.#until(() => this.#hasEnded, 'its end')
    if (!this.console.includes('VARVE finished'))
      throw new Error(`the guest did not end by itself:\n${this.#lastSaid()}`)
  }

  /** Waits until the console shows `pattern`; false when QEMU ends before, or says nothing at all for so many seconds. */
  hears(pattern: RegExp, seconds: number): Promise<boolean> {
    return this.#waits(() => pattern.test(this.console), seconds)
  }

  /** Takes its power away and waits for QEMU's end. */
  async kill(): Promise<void> {
    if (!this.#hasEnded) this.#process.kill('SIGKILL')
    await this.#ended
  }

  /** Waits for QEMU's end. */
  ended(): Promise<void> {
    return this.#ended
  }

  async #until(isSo: () => boolean, what: string): Promise<void> {
    if (await this.#waits(isSo, SILENCE)) return
    const names = this.#disks.map((disk) => disk.name).join(', ')
    const how = this.#hasEnded ? 'ended' : 'stands still'
    throw new Error(`the guest with ${names} ${how} before ${what}:\n${this.#lastSaid()}`)
  }

  async #waits(isSo: () => boolean, seconds: number): Promise<boolean> {
    let said = this.console.length
    let silent = 0
    while (!isSo()) {
      if (this.#hasEnded || silent === seconds) return false
      await this.#change(1000)
      silent = this.console.length === said ? silent + 1 : 0
      said = this.console.length
    }
    return true
  }

  #lastSaid(): string {
    return this.console.slice(-LAST_SAID)
  }

  /** Resolves when something was said, or after so long. */
  #change(mostMs: number): Promise<void> {
    return new Promise((resolve) => {
      const timer = setTimeout(resolve, mostMs)
      this.#watchers.push(() => {
        clearTimeout(timer)
        resolve()
      })
    })
  }

  #wake(): void {
    for (const tell of this.#watchers.splice(0)) tell()
  }
}

function argumentsOf({
  disks,
  qmp,
  agent,
  incoming,
  isWriting = true,
  hasSystem = false,
  args = [],
}: GuestOptions): string[] {
  const kernel = findKernel()
  if (kernel === undefined) throw new Error('no cloud kernel is installed')
  const devices = disks.flatMap(({ name, blockdev }) => [
    '-blockdev',
    `node-name=${name},${blockdev}`,
    '-device',
    `virtio-blk-pci,drive=${name},id=device-${name},serial=${name}`,
  ])
  const words = ['console=ttyS0', 'panic=-1', 'loglevel=7', `writing=${isWriting ? 'yes' : 'no'}`]
  const append = [...words, ...(hasSystem ? ['system=yes'] : [])].join(' ')
  // A microvm boots no faster, and has no clock by which its kernel could measure the processor's: half of them hang there on a busy host.
  const plain = '-M pc,accel=tcg -cpu max -m 256 -nodefaults -no-reboot -display none -serial stdio'.split(' ')
  const boot = ['-kernel', kernel.image, '-initrd', initramfsOf(kernel.modules), '-append', append]
  const monitor = qmp === undefined ? [] : ['-qmp', `unix:${qmp},server=on,wait=off`]
  const memory = incoming === undefined ? [] : ['-incoming', incoming.uri]
  return [...plain, ...boot, ...devices, ...monitor, ...agentAt(agent), ...memory, ...args]
}

function agentAt(socket: string | undefined): string[] {
  if (socket === undefined) return []
  const port = 'virtserialport,chardev=agent,name=org.qemu.guest_agent.0'
  const line = `socket,id=agent,path=${socket},server=on,wait=off`
  return ['-device', 'virtio-serial-pci', '-chardev', line, '-device', port]
}

let packed: string | undefined

/** Packed once for the process; goes when it ends. */
function initramfsOf(modules: string): string {
  if (packed !== undefined) return packed
  const folder = fs.mkdtempSync(path.join(process.env['VARVE_TEST_DIR'] ?? os.tmpdir(), 'varve-guest-'))
  process.once('exit', () => fs.rmSync(folder, { recursive: true, force: true }))
  packed = path.join(folder, 'initramfs')
  makeInitramfs(packed, modules)
  return packed
}
