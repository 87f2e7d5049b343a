// `varve files`: lists and takes files out of a backup, without mounting anything and without root. Partitions and ext2, ext3 and ext4 are
// read here; any other file system is named, with the commands that read it.

import fs from 'node:fs'
import path from 'node:path'
import { once } from 'node:events'
import { type Command, Option } from 'commander'
import { formatSize } from '../base/size.ts'
import type { BlockDevice } from '../block/device.ts'
import { BlockError, toBlockError } from '../block/error.ts'
import { SliceFilter } from '../filter/slice.ts'
import { ExtFileSystem } from '../format/ext/ext-file-system.ts'
import type { Inode } from '../format/ext/inode.ts'
import { fileSystemOf } from '../format/file-systems.ts'
import type { Partition } from '../format/partitions/partition.ts'
import { readPartitions } from '../format/partitions/partitions.ts'
import { chooseDisk } from '../repository/choose-disk.ts'
import { type BackupName, parseBackupName } from './backup-name.ts'
import { print, table, warn } from './context.ts'
import { cliOf } from './daemon-context.ts'
import { repoOption, type RepositoryFlags, withKeys, withRepository } from './repository.ts'

interface FilesOptions extends RepositoryFlags {
  readonly repo: string
  readonly to?: string
}

/** A part of a disk that may hold a file system: a partition, or all of it. */
interface Volume {
  readonly partition: Partition | undefined
  /** Undefined for one that cannot be opened. */
  readonly device: BlockDevice | undefined
  readonly fileSystem: string | undefined
}

export function addFilesCommand(program: Command): void {
  const files = program.command('files').description('files in a backup: ext2, ext3 and ext4, on partitions or without')
  const name = '<backup[:disk[:partition]]>'
  withKeys(files.command(`list ${name} [path]`).addOption(repoOption()))
    .description('what is in a directory of a backup; without a path and with several partitions, these')
    .action(list)
  withKeys(files.command(`get ${name} <path>`).addOption(repoOption()))
    .description('a file of a backup, on standard output or into a new file')
    .addOption(new Option('--to <file>', 'make this file; a sparse one stays sparse'))
    .action(get)
}

async function list(named: string, wanted: string | undefined, options: FilesOptions, command: Command): Promise<void> {
  const cli = cliOf(command)
  await withDisk(named, options, async (disk, name) => {
    const volumes = await volumesOf(disk)
    if (wanted === undefined && name.partition === undefined && volumes.length > 1) {
      const rows = volumes.map(({ partition, fileSystem }) => ({ ...partition, fileSystem }))
      return print(cli, rows, () => volumeTable(volumes))
    }
    const system = await openFileSystem(volumes, name, options.repo)
    const inode = await system.find(wanted ?? '/')
    const entries =
      inode.type === 'directory' ? await system.list(inode) : [{ name: path.posix.basename(wanted ?? ''), inode }]
    const rows = await Promise.all(
      entries.map(async (entry) => ({
        name: entry.name,
        type: entry.inode.type,
        mode: entry.inode.mode,
        size: entry.inode.size,
        modifiedMs: entry.inode.modifiedMs,
        ...(entry.inode.type === 'link' ? { target: await system.readLink(entry.inode) } : {}),
      })),
    )
    print(cli, rows, () =>
      table(
        ['TYPE', 'MODE', 'SIZE', 'MODIFIED', 'NAME'],
        rows.map(({ name: file, type, mode, size, modifiedMs, target }) => [
          type,
          mode.toString(8).padStart(4, '0'),
          String(size),
          new Date(modifiedMs).toISOString(),
          target === undefined ? printable(file) : `${printable(file)} -> ${printable(target)}`,
        ]),
      ),
    )
  })
}

async function get(named: string, wanted: string, options: FilesOptions, command: Command): Promise<void> {
  await withDisk(named, options, async (disk, name) => {
    const system = await openFileSystem(await volumesOf(disk), name, options.repo)
    const inode = await system.find(wanted)
    if (inode.type !== 'file') throw new BlockError('invalid-argument', `${wanted} is a ${inode.type}, not a file`)
    if (options.to === undefined) return writeOut(system, inode)
    const target = path.resolve(options.to)
    await writeFile(system, inode, target)
    print(cliOf(command), { file: target, size: inode.size }, () => target)
  })
}

async function withDisk(
  named: string,
  options: FilesOptions,
  work: (disk: BlockDevice, name: BackupName) => Promise<void>,
): Promise<void> {
  const name = parseBackupName(named, true)
  await withRepository(options.repo, options, async (repository) => {
    const reader = await repository.openBackup(name.backup)
    try {
      const { name: disk, device } = chooseDisk(reader, name.disk)
      await work(device, { ...name, disk })
    } finally {
      await reader.close()
    }
  })
}

/** The partitions of a disk, or the disk. */
async function volumesOf(disk: BlockDevice): Promise<Volume[]> {
  const whole = await fileSystemOf(disk)
  const found = whole === undefined || whole === 'ext' ? await readPartitions(disk) : undefined
  if (found === undefined || found.partitions.length === 0)
    return [{ partition: undefined, device: disk, fileSystem: whole }]
  return Promise.all(
    found.partitions.map(async (partition) => {
      const device =
        partition.problem === undefined ? new SliceFilter(disk, partition.start, partition.size) : undefined
      return { partition, device, fileSystem: device === undefined ? undefined : await fileSystemOf(device) }
    }),
  )
}

/** The file system that is meant: of that partition, or the only one that can be read. */
async function openFileSystem(volumes: readonly Volume[], name: BackupName, repo: string): Promise<ExtFileSystem> {
  const volume = chooseVolume(volumes, name)
  const { partition, device, fileSystem } = volume
  const what = partition === undefined ? `disk ${name.disk}` : `partition ${partition.number}`
  if (device === undefined) throw new BlockError('corrupt', `${what} ${partition?.problem}`)
  if (fileSystem !== 'ext') {
    const is =
      fileSystem === undefined ? 'holds nothing that is known here' : `is ${fileSystem}, which is not read here`
    const socket = '$PWD/backup.sock'
    const mounted = `/dev/sda${partition?.number ?? ''}`
    const way =
      `varve export ${name.backup}:${name.disk} --repo ${repo} --socket "${socket}", and beside it ` +
      `guestfish --ro --format=raw -a "nbd://?socket=${socket}" -m ${mounted}`
    throw new BlockError('unsupported', `${what} ${is}. Another way: ${way}`)
  }
  const system = await ExtFileSystem.open(device)
  if (system.needsRecovery)
    warn(
      `${what} was in use at the moment of the backup: what was written last may be in its journal only, and is not shown`,
    )
  return system
}

function chooseVolume(volumes: readonly Volume[], { backup, disk, partition }: BackupName): Volume {
  const form = `${backup}:${disk}`
  if (partition !== undefined) {
    const found = volumes.find((volume) => volume.partition?.number === partition)
    if (found !== undefined) return found
    const numbers = volumes.flatMap((volume) => volume.partition?.number ?? [])
    const has = numbers.length === 0 ? 'no partitions' : `the partitions ${numbers.join(', ')}`
    throw new BlockError('not-found', `disk ${disk} has no partition ${partition}; it has ${has}`)
  }
  const [only, ...others] = volumes.length === 1 ? volumes : volumes.filter(({ fileSystem }) => fileSystem === 'ext')
  if (only !== undefined && others.length === 0) return only
  const known = volumes.map((volume) => `${volume.partition?.number} (${volume.fileSystem ?? 'not known'})`).join(', ')
  throw new BlockError('invalid-argument', `disk ${disk} has the partitions ${known}: name one, as ${form}:NUMBER`)
}

function volumeTable(volumes: readonly Volume[]): string {
  return table(
    ['PARTITION', 'SIZE', 'HOLDS', 'LABEL'],
    volumes.map(({ partition, fileSystem }) => [
      String(partition?.number ?? ''),
      formatSize(partition?.size ?? 0),
      partition?.problem ?? fileSystem ?? 'not known',
      printable(partition?.label ?? ''),
    ]),
  )
}

/** Zeros are written out: what reads this may be no file. */
async function writeOut(system: ExtFileSystem, inode: Inode): Promise<void> {
  const zeros = Buffer.alloc(65_536)
  for await (const { length, bytes } of system.read(inode)) {
    if (bytes !== undefined) await put(bytes)
    else
      for (let at = 0; at < length; at += zeros.length)
        await put(zeros.subarray(0, Math.min(zeros.length, length - at)))
  }
}

async function put(bytes: Uint8Array): Promise<void> {
  if (!process.stdout.write(bytes)) await once(process.stdout, 'drain')
}

/** Makes the file, which is not there afterwards when that fails. Kind 'exists' for one that is there. */
async function writeFile(system: ExtFileSystem, inode: Inode, target: string): Promise<void> {
  let file: number
  try {
    file = fs.openSync(target, 'wx', 0o600)
  } catch (error) {
    throw toBlockError(error, target, { path: target })
  }
  try {
    for await (const { offset, bytes } of system.read(inode)) {
      if (bytes !== undefined) fs.writeSync(file, bytes, 0, bytes.length, offset)
    }
    fs.ftruncateSync(file, inode.size)
    fs.fsyncSync(file)
  } catch (error) {
    fs.rmSync(target, { force: true })
    throw toBlockError(error, target, { path: target })
  } finally {
    fs.closeSync(file)
  }
}

/** Names come from a guest: what would speak to the terminal is shown as a sign. */
function printable(name: string): string {
  return name.replaceAll(/\p{Cc}/gu, '\u{fffd}')
}
