// varve disk blockdev: how a guest attaches to a disk, for QEMU's command line, for its monitor, or for libvirt. Only says it: nothing is
// changed here, and no QEMU is asked. All three have the client wait and connect again when the daemon goes away, so that its restart is a
// pause to the guest.

import { createHash } from 'node:crypto'
import { type Command, InvalidArgumentError, Option } from 'commander'
import type { DiskReply } from '../api/schema.ts'
import { BlockError } from '../block/error.ts'
import { parseNbdUri } from '../nbd/uri.ts'
import { print } from './context.ts'
import { cliOf } from './daemon-context.ts'

/** Where a disk is served, and how its client shall take it. */
export interface Attachment {
  /** The disk's name, which its export has too. */
  readonly name: string
  /** The Unix socket. */
  readonly socket: string
  /** How long requests wait for a daemon that went away before the guest gets errors, in seconds. */
  readonly reconnectSeconds: number
}

interface BlockdevOptions {
  readonly libvirt?: boolean
  readonly device: string
  readonly target: string
  readonly reconnect: number
}

/** A day: a guest that waits can be helped, one that got errors has remounted its file systems read-only. */
export const RECONNECT_SECONDS = 86_400
/** What QEMU takes, and more than sense does. */
const RECONNECT_SECONDS_MAX = 2 ** 32 - 1

export function addBlockdevCommand(disk: Command): void {
  disk
    .command('blockdev <name>')
    .description('print the arguments for QEMU that attach a guest to a disk; with --json, those of its monitor')
    .option('--libvirt', 'print libvirt’s <disk> element instead, for virsh attach-device or virsh edit')
    .addOption(new Option('--device <driver>', 'the guest’s device, for QEMU').default('virtio-blk-pci'))
    .addOption(new Option('--target <name>', 'the guest’s device, for libvirt').default('vda'))
    .addOption(
      new Option('--reconnect <seconds>', 'how long requests wait for a daemon that went away before they fail')
        .default(RECONNECT_SECONDS, 'a day')
        .argParser(secondsArgument),
    )
    .action(async (name: string, options: BlockdevOptions, command: Command) => {
      const cli = cliOf(command)
      const attachment = attachmentOf(await cli.api.call('showDisk', { disk: name }, {}), options.reconnect)
      if (options.libvirt === true) {
        const xml = libvirtDisk(attachment, options.target)
        print(cli, { xml }, () => xml)
        return
      }
      const objects = qemuObjects(attachment, options.device)
      print(cli, objects, () => qemuArguments(objects))
    })
}

/** Kinds 'busy' when the disk is not served, 'unsupported' when not on a Unix socket. */
export function attachmentOf({ name, uri, state }: DiskReply, reconnectSeconds: number): Attachment {
  if (uri === undefined)
    throw new BlockError('busy', `disk ${name} is ${state} and not served: varve disk show ${name}`)
  const place = parseNbdUri(uri)
  if (place.transport !== 'unix') throw new BlockError('unsupported', `disk ${name} has no Unix socket: ${uri}`)
  return { name, socket: place.path, reconnectSeconds }
}

function secondsArgument(text: string): number {
  const seconds = Number(text)
  if (/^\d+$/.test(text) && seconds <= RECONNECT_SECONDS_MAX) return seconds
  throw new InvalidArgumentError(`It is a number of seconds, 0 to ${RECONNECT_SECONDS_MAX}.`)
}

export interface QemuObjects {
  /** The arguments of blockdev-add. */
  readonly blockdev: Readonly<Record<string, unknown>>
  /** The arguments of device_add. */
  readonly device: Readonly<Record<string, unknown>>
}

/** What QEMU's monitor takes as blockdev-add and device_add. */
export function qemuObjects({ name, socket, reconnectSeconds }: Attachment, device: string): QemuObjects {
  return {
    blockdev: {
      driver: 'nbd',
      'node-name': nodeName(name),
      server: { type: 'unix', path: socket },
      export: name,
      'reconnect-delay': reconnectSeconds,
      discard: 'unmap',
    },
    device: { driver: device, drive: nodeName(name), id: `varve-${name}`, serial: name.slice(0, SERIAL_MAX) },
  }
}

/** A disk's name may be longer than a node's, which has 31 characters, or begin with a digit. */
function nodeName(name: string): string {
  if (/^[A-Za-z].{0,30}$/.test(name)) return name
  return `varve-${createHash('sha256').update(name).digest('hex').slice(0, 16)}`
}

/** virtio-blk's serial number has so many bytes. */
const SERIAL_MAX = 20

/** The same as arguments of QEMU's command line, quoted for a shell. JSON, in which no character of a path means something else. */
export function qemuArguments({ blockdev, device }: QemuObjects): string {
  return [`-blockdev ${quoted(JSON.stringify(blockdev))}`, `-device ${quoted(JSON.stringify(device))}`].join('\n')
}

function quoted(text: string): string {
  return `'${text.replaceAll("'", `'\\''`)}'`
}

/** libvirt's element for the same. `<reconnect>` is known to libvirt 9.1 and newer, and refused by none before: they leave it out. */
export function libvirtDisk({ name, socket, reconnectSeconds }: Attachment, target: string): string {
  return [
    `<disk type='network' device='disk'>`,
    `  <driver name='qemu' type='raw' discard='unmap'/>`,
    `  <source protocol='nbd' name='${escaped(name)}'>`,
    `    <host transport='unix' socket='${escaped(socket)}'/>`,
    `    <reconnect delay='${reconnectSeconds}'/>`,
    `  </source>`,
    `  <target dev='${escaped(target)}' bus='virtio'/>`,
    `  <serial>${escaped(name.slice(0, SERIAL_MAX))}</serial>`,
    `</disk>`,
  ].join('\n')
}

const ENTITIES: Readonly<Record<string, string>> = {
  '&': '&amp;',
  '<': '&lt;',
  '>': '&gt;',
  "'": '&apos;',
  '"': '&quot;',
}

function escaped(text: string): string {
  return text.replaceAll(/[&<>'"]/g, (character) => ENTITIES[character] as string)
}
