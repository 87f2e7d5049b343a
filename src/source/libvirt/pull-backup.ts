// libvirt's backup job in pull mode (formatbackup in libvirt): at its begin it takes a moment of all disks, and a checkpoint with it; until it is
// ended QEMU serves the moment over NBD, and saves what the guest overwrites to files. A machine has one such job at most, and it
// outlives whoever began it: one that is ours is known by the socket it serves at.

import { setTimeout as delay } from 'node:timers/promises'
import { VIRSH_JOB_GONE_MS, VIRSH_JOB_LOOK_MS } from '../../base/qemu-limits.ts'
import { BlockError, isBlockError } from '../../block/error.ts'
import type { Virsh } from './virsh.ts'
import { childOf, parseXml, xml } from './xml.ts'

/** Of the bitmap that a disk's export shows. */
const BITMAP = 'changed'
export const DIRTY_CONTEXT = `qemu:dirty-bitmap:${BITMAP}`

export interface PulledDisk {
  /** Its target, which is its export's name too. */
  readonly name: string
  /** Where what is overwritten goes: the file is not there. */
  readonly scratch: string
  /** What changed since this checkpoint is shown. */
  readonly since?: string | undefined
}

export interface PullBackup {
  readonly socket: string
  /** Of those of the machine, by target, the ones that are in it. */
  readonly all: readonly string[]
  readonly disks: readonly PulledDisk[]
}

export function backupXml({ socket, all, disks }: PullBackup): string {
  const described = all.map((target) => {
    const disk = disks.find(({ name }) => name === target)
    if (disk === undefined) return xml('disk', { name: target, backup: 'no' })
    const { scratch, since } = disk
    const ways =
      since === undefined
        ? { backupmode: 'full' }
        : { backupmode: 'incremental', incremental: since, exportbitmap: BITMAP }
    const inner = xml('driver', { type: 'qcow2' }) + xml('scratch', { file: scratch })
    return xml('disk', { name: target, backup: 'yes', type: 'file', exportname: target, ...ways }, inner)
  })
  const server = xml('server', { transport: 'unix', socket })
  return xml('domainbackup', { mode: 'pull' }, server + xml('disks', {}, described.join('')))
}

/** Begins it by what is in these files; one checkpoint at most. Kinds of asking. */
export async function beginPull(virsh: Virsh, backupFile: string, checkpointFile: string | undefined): Promise<void> {
  const checkpoint = checkpointFile === undefined ? [] : ['--checkpointxml', checkpointFile]
  await virsh.ask('backup-begin', ['--backupxml', backupFile, ...checkpoint])
}

/** The socket that the machine's backup job serves at, '' for one that does not; undefined when it has none. */
export async function pullSocket(virsh: Virsh): Promise<string | undefined> {
  try {
    const server = childOf(parseXml(await virsh.ask('backup-dumpxml')), 'server')
    return server?.attributes.get('socket') ?? ''
  } catch (error) {
    if (isBlockError(error, 'not-found')) return undefined
    throw error
  }
}

/** Ends the backup job that serves at this socket, if there is one; whether there was. Kind 'busy' for one that is somebody else's. */
export async function endPull(virsh: Virsh, socket: string): Promise<boolean> {
  const found = await pullSocket(virsh)
  if (found === undefined) return false
  if (found !== socket) {
    const advice = `wait for its end, or end it: virsh -c ${virsh.place.connect} domjobabort ${virsh.place.domain}`
    throw new BlockError('busy', `${virsh.name} is being backed up by somebody else; ${advice}`)
  }
  await virsh.ask('domjobabort')
  const until = performance.now() + VIRSH_JOB_GONE_MS
  while ((await pullSocket(virsh)) !== undefined) {
    if (performance.now() > until)
      throw new BlockError('timeout', `${virsh.name}: its backup job does not end, which was told to`)
    await delay(VIRSH_JOB_LOOK_MS)
  }
  return true
}
