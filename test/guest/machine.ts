// A real guest: Debian's cloud kernel with a busybox initramfs, run by QEMU in software emulation. Its only work is to write
// numbered lines into a file of the ext4 disk it is given, to sync after each, and to say on its console which are synced.
//
//   console:  VARVE up   VARVE synced 1   VARVE synced 2   ...   VARVE done

import { type ChildProcess, spawn } from 'node:child_process'
import fs from 'node:fs'
import path from 'node:path'

const MODULES = [
  'drivers/virtio/virtio_ring.ko',
  'drivers/virtio/virtio.ko',
  'drivers/virtio/virtio_mmio.ko',
  'drivers/block/virtio_blk.ko',
]

/** How long a boot may take, and how often it is tried. */
const BOOT_MS = 30_000
const BOOTS_MAX = 12

/** The newest installed cloud kernel, or undefined. */
export function findKernel(): { image: string; modules: string } | undefined {
  const name = fs.existsSync('/boot')
    ? fs.readdirSync('/boot').findLast((file) => /^vmlinuz-.*cloud/.test(file))
    : undefined
  if (name === undefined) return undefined
  return {
    image: path.join('/boot', name),
    modules: path.join('/lib/modules', name.slice('vmlinuz-'.length), 'kernel'),
  }
}

const INIT = `#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t devtmpfs dev /dev
for module in virtio_ring virtio virtio_mmio virtio_blk; do /bin/busybox insmod /modules/$module.ko; done
/bin/busybox mount -t ext4 /dev/vda /disk || echo VARVE mount failed
echo VARVE up
line=0
while [ ! -e /disk/stop ] && [ $line -lt LINES ]; do
  line=$((line + 1))
  echo "line $line of the guest's journal" >> /disk/journal
  /bin/busybox dd if=/dev/urandom of=/disk/noise bs=4096 count=8 seek=$((line * 8 % 4096)) conv=notrunc 2>/dev/null
  /bin/busybox sync && echo VARVE synced $line
done
/bin/busybox umount /disk
/bin/busybox dmesg | /bin/busybox grep -iE 'i/o error|ext4-fs error|blk_update' && echo VARVE kernel complained
echo VARVE done
/bin/busybox poweroff -f
`

/** Writes an initramfs for `lines` journal lines, in the kernel's newc cpio format. */
export function makeInitramfs(file: string, modules: string, lines: number): void {
  const entries: [name: string, mode: number, content: Uint8Array][] = [
    ...['bin', 'dev', 'proc', 'disk', 'modules'].map((name): [string, number, Uint8Array] => [
      name,
      0o040755,
      Buffer.alloc(0),
    ]),
    ['bin/busybox', 0o100755, fs.readFileSync('/bin/busybox')],
    ['init', 0o100755, Buffer.from(INIT.replace('LINES', String(lines)))],
    ...MODULES.map((module): [string, number, Uint8Array] => [
      `modules/${path.basename(module)}`,
      0o100644,
      fs.readFileSync(path.join(modules, module)),
    ]),
  ]
  const parts: Uint8Array[] = []
  entries.forEach(([name, mode, content], index) => parts.push(...cpioEntry(name, mode, index + 1, content)))
  parts.push(...cpioEntry('TRAILER!!!', 0, 0, Buffer.alloc(0)))
  fs.writeFileSync(file, Buffer.concat(parts))
}

function cpioEntry(name: string, mode: number, inode: number, content: Uint8Array): Uint8Array[] {
  const fields = [inode, mode, 0, 0, 1, 0, content.length, 0, 0, 0, 0, name.length + 1, 0]
  const header = Buffer.from(`070701${fields.map((field) => field.toString(16).padStart(8, '0')).join('')}${name}\0`)
  const pad = (length: number): Buffer => Buffer.alloc((4 - (length % 4)) % 4)
  return [header, pad(header.length), content, pad(content.length)]
}

/** A running guest. */
export class GuestMachine {
  readonly #process: ChildProcess
  readonly #ended: Promise<void>
  console = ''

  /**
   * Boots a guest whose disk is served over NBD at `socket` as `name`, and waits until it is up. On a loaded machine its kernel
   * sometimes hangs in the calibration of its timers, before it has seen the disk: then it is booted again.
   */
  static async boot(kernel: string, initramfs: string, socket: string, name: string): Promise<GuestMachine> {
    let said = ''
    for (let attempt = 0; attempt < BOOTS_MAX; attempt++) {
      const guest = new GuestMachine(kernel, initramfs, socket, name)
      const deadline = performance.now() + BOOT_MS
      while (performance.now() < deadline && !guest.console.includes('VARVE up')) {
        await new Promise((resolve) => setTimeout(resolve, 50))
      }
      if (guest.console.includes('VARVE up')) return guest
      said = guest.console
      guest.kill()
      await guest.ended()
      if (/virtio|EXT4/i.test(said)) break
    }
    throw new Error(`the guest did not boot:\n${said}`)
  }

  private constructor(kernel: string, initramfs: string, socket: string, name: string) {
    const drive = `driver=nbd,node-name=disk,server.type=unix,server.path=${socket},export=${name},reconnect-delay=60`
    const options = `-M microvm,accel=tcg,rtc=on -cpu max -m 256 -nodefaults -no-reboot -display none -serial stdio
      -kernel ${kernel} -initrd ${initramfs} -blockdev ${drive} -device virtio-blk-device,drive=disk`
    const args = [...options.split(/\s+/), '-append', 'console=ttyS0 panic=-1']
    this.#process = spawn('qemu-system-x86_64', args, { stdio: ['ignore', 'pipe', 'pipe'] })
    const hear = (chunk: Buffer): void => {
      this.console += chunk.toString('utf8')
    }
    this.#process.stdout?.on('data', hear)
    this.#process.stderr?.on('data', hear)
    this.#ended = new Promise((resolve) => this.#process.once('exit', () => resolve()))
  }

  /** The highest line that the guest said it has synced. */
  get synced(): number {
    const said = [...this.console.matchAll(/VARVE synced (\d+)/g)]
    return Number(said.at(-1)?.[1] ?? 0)
  }

  /** Waits until `count` more lines are synced. */
  async progress(count: number, timeoutMs = 60_000): Promise<void> {
    const target = this.synced + count
    const deadline = performance.now() + timeoutMs
    while (this.synced < target) {
      if (performance.now() > deadline)
        throw new Error(`the guest stands still at line ${this.synced}:\n${this.console}`)
      await new Promise((resolve) => setTimeout(resolve, 20))
    }
  }

  /** Waits for the guest to power itself off. */
  async ended(timeoutMs = 120_000): Promise<void> {
    const late = new Promise<never>((_, reject) => {
      setTimeout(() => reject(new Error(`the guest did not end:\n${this.console}`)), timeoutMs).unref()
    })
    await Promise.race([this.#ended, late])
  }

  kill(): void {
    this.#process.kill('SIGKILL')
  }
}
