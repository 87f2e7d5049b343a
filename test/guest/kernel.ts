// What a guest boots: Debian's cloud kernel, and an initramfs of busybox, the kernel's modules for virtio and init.sh, packed here.

import fs from 'node:fs'
import path from 'node:path'
import { hasProgram } from '../support/peer.ts'

export interface GuestKernel {
  readonly image: string
  /** The folder of its modules. */
  readonly modules: string
}

/** In the order in which they need each other. */
const MODULES = [
  'drivers/virtio/virtio_ring.ko',
  'drivers/virtio/virtio.ko',
  'drivers/virtio/virtio_pci_legacy_dev.ko',
  'drivers/virtio/virtio_pci_modern_dev.ko',
  'drivers/virtio/virtio_pci.ko',
  'drivers/block/virtio_blk.ko',
  'drivers/char/virtio_console.ko',
]

const FOLDERS = ['bin', 'dev', 'proc', 'sys', 'modules']
const BUSYBOX = '/bin/busybox'
const NAMES_ON_HOST = ['qemu-system-x86_64', 'qemu-img', 'mke2fs', 'e2fsck', 'debugfs']

/** For node:test's `skip` option: false when guests can be run here, else what is missing. */
export function guestsMissing(): string | false {
  const absent = NAMES_ON_HOST.filter((name) => !hasProgram(name))
  if (findKernel() === undefined) absent.push('linux-image-cloud-amd64')
  if (!fs.existsSync(BUSYBOX)) absent.push('busybox-static')
  return absent.length === 0 ? false : `${absent.join(', ')} not installed`
}

/** The newest installed cloud kernel, or undefined. */
export function findKernel(): GuestKernel | undefined {
  const images = fs.existsSync('/boot') ? fs.readdirSync('/boot').sort() : []
  const name = images.findLast((file) => /^vmlinuz-.*cloud/.test(file))
  if (name === undefined) return undefined
  const modules = path.join('/lib/modules', name.slice('vmlinuz-'.length), 'kernel')
  return { image: path.join('/boot', name), modules }
}

/** Writes the initramfs, in the kernel's newc cpio format. */
export function makeInitramfs(file: string, modules: string): void {
  const order = MODULES.map((module) => path.basename(module))
  const entries: [name: string, mode: number, content: Uint8Array][] = [
    ...FOLDERS.map((name): [string, number, Uint8Array] => [name, 0o040755, Buffer.alloc(0)]),
    ['bin/busybox', 0o100755, fs.readFileSync(BUSYBOX)],
    ['init', 0o100755, fs.readFileSync(path.join(import.meta.dirname, 'init.sh'))],
    ['modules/order', 0o100644, Buffer.from(`${order.join('\n')}\n`)],
    ...MODULES.map((module, index): [string, number, Uint8Array] => [
      `modules/${order[index]}`,
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
