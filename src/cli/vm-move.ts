// varve vm adopt and release: a disk of a running QEMU machine becomes one of Varve's, or a plain file again, while its guest writes. Copying and
// switching over are QEMU's own mirror (move-disk.ts); here is where to, and what goes when it fails. The command holds QEMU's monitor meanwhile, and
// when it dies the guest is on its old disk: the next one removes what it left.

import fs from 'node:fs'
import path from 'node:path'
import { type Command, Option } from 'commander'
import { BlockError } from '../block/error.ts'
import { type Format, FORMATS } from '../chain/open.ts'
import { realHost } from '../host/real.ts'
import { type DiskInUse, pick } from '../source/qemu/disk-in-use.ts'
import { moveDisk } from '../source/qemu/move-disk.ts'
import type { QmpClient } from '../source/qemu/qmp-client.ts'
import { attachmentOf, qemuObjects, RECONNECT_SECONDS } from './blockdev.ts'
import { print, sizeArgument, warn } from './context.ts'
import { cliOf } from './daemon-context.ts'
import { refuseExisting, untilInterrupted, withVm } from './vm-contact.ts'

interface MoveOptions {
  readonly format: Format
  readonly as?: string
  readonly speed: number
}

export function addMoveCommands(vm: Command): void {
  const format = (): Option => new Option('-f, --format <format>', 'of the image').choices(FORMATS).default('qcow2')
  const speed = (): Option =>
    new Option('--speed <rate>', 'bytes per second').default(0, 'no limit').argParser(sizeArgument)
  vm.command('adopt <vm> <disk> <image>')
    .description('move a disk of a running machine onto a new disk of Varve’s, in this image, while its guest writes')
    .addOption(format())
    .addOption(speed())
    .option('--as <name>', 'the name of Varve’s disk; VM-DISK unless told')
    .action(adopt)
  vm.command('release <vm> <disk> <image>')
    .description(
      'move it into a plain image that QEMU opens itself, while its guest writes; Varve’s disk stays as it is then',
    )
    .addOption(format())
    .addOption(speed())
    .action(release)
}

async function adopt(
  vm: string,
  disk: string,
  image: string,
  { format, as, speed }: MoveOptions,
  command: Command,
): Promise<void> {
  const cli = cliOf(command)
  const name = as ?? `${vm}-${disk}`
  const file = path.resolve(image)
  const left = await withVm(cli, vm, async (client, disks) => {
    const found = pick(vm, disks, disk)
    const added = await cli.api.call('addDisk', {}, { name, image: file, format, size: found.size })
    const forget = async (): Promise<void> => {
      await cli.api.call('removeDisk', { disk: name }, {})
      fs.rmSync(file, { force: true })
    }
    const { blockdev } = qemuObjects(attachmentOf(added, RECONNECT_SECONDS), '')
    return move(client, found, { target: blockdev, speed, forget })
  })
  const next = `at its next start, give QEMU what varve disk blockdev ${name} prints`
  print(cli, { disk: name, ...left }, () => `${vm}: ${disk} is Varve’s disk ${name} now; ${next}`)
}

async function release(
  vm: string,
  disk: string,
  image: string,
  { format, speed }: MoveOptions,
  command: Command,
): Promise<void> {
  const { createImage } = await import('../image/create.ts')
  const cli = cliOf(command)
  const file = path.resolve(image)
  refuseExisting(file)
  const left = await withVm(cli, vm, async (client, disks) => {
    const found = pick(vm, disks, disk)
    await createImage({ host: realHost, path: file, format, settings: { size: found.size } })
    const target = { driver: format, file: { driver: 'file', filename: file, discard: 'unmap' }, discard: 'unmap' }
    const forget = (): Promise<void> => fs.promises.rm(file, { force: true })
    return move(client, found, { target, speed, forget })
  })
  print(cli, { image: file, ...left }, () => `${vm}: ${disk} is in ${file} now; at its next start, give QEMU that`)
}

interface Plan {
  /** blockdev-add's arguments for where it goes. */
  readonly target: Readonly<Record<string, unknown>>
  readonly speed: number
  /** Removes the target of a move that failed. */
  readonly forget: () => Promise<void>
}

/** Moves it, with a bar. What failed has its target removed, unless nobody can say any more which disk the guest had last. */
async function move(
  client: QmpClient,
  { top, name }: DiskInUse,
  { target, speed, forget }: Plan,
): Promise<{ readonly left?: string }> {
  const outcome = await untilInterrupted(name, (watch) => moveDisk(client, { from: top, target, speed, ...watch }))
  switch (outcome.is) {
    case 'moved':
      if (outcome.left === undefined) return {}
      warn(outcome.left)
      return { left: outcome.left }
    case 'stayed':
      await forget()
      throw new BlockError(
        outcome.error.kind === 'cancelled' ? 'cancelled' : 'io',
        `${name} was not moved, the guest has its old disk: ${outcome.error.message}`,
      )
    case 'unknown': {
      const what = 'QEMU was lost while it switched over, so both disks are kept: the one changed last is the guest’s'
      throw new BlockError(outcome.error.kind, `${what}: ${outcome.error.message}`, {}, outcome.error)
    }
  }
}
