// Storage that takes 5 MB a second, to copy to: an NBD export of nbdkit's with its rate filter, and a folder on a file system on such an
// export (mounted by nbdfuse and a loop device; it takes root).

import fs from 'node:fs'
import path from 'node:path'
import { check, versionOf } from './machine.ts'
import { answers, type RunningProcess, startProcess } from './process.ts'

/** nbdkit counts bits: 5 MB a second. */
const RATE = '40M'

interface SlowTarget {
  /** An NBD URI or a folder. */
  readonly place: string
  remove(): Promise<void>
}

/** Why there can be none on this machine; undefined when there can. */
export function whyNoSlowTarget(): string | undefined {
  if (process.getuid?.() !== 0) return 'it takes root to mount a file system'
  if (!fs.existsSync('/dev/fuse') || !fs.existsSync('/dev/loop-control')) return 'there is no /dev/fuse or no /dev/loop'
  const missing = ['nbdkit', 'nbdfuse', 'mkfs.ext4'].find((program) => versionOf(program, '-V') === undefined)
  return missing === undefined ? undefined : `${missing} is not installed`
}

export async function makeSlowExport(folder: string, sizeMiB: number): Promise<SlowTarget> {
  const socket = path.join(folder, 'slow.sock')
  const nbdkit = ['nbdkit', '-f', '-U', socket, '--filter=rate', 'memory', `${sizeMiB}M`, `rate=${RATE}`]
  const server = await startProcess(nbdkit, () => answers({ path: socket }))
  return { place: `nbd+unix:///?socket=${socket}`, remove: () => server.stop() }
}

export async function makeSlowFolder(folder: string, sizeMiB: number): Promise<SlowTarget> {
  const [place, image] = [path.join(folder, 'slow'), path.join(folder, 'slow-image')]
  const undo: (() => unknown)[] = []
  const remove = async (): Promise<void> => {
    for (const step of undo.toReversed()) await step()
  }
  try {
    const socket = path.join(folder, 'slow-folder.sock')
    // Made at full speed, then served slowly.
    const memory = path.join(folder, 'slow-memory')
    fs.writeFileSync(memory, '')
    fs.truncateSync(memory, sizeMiB * 1024 * 1024)
    check('mkfs.ext4', '-q', '-F', '-E', 'lazy_itable_init=1,lazy_journal_init=1', memory)
    const nbdkit = ['nbdkit', '-f', '-U', socket, '--filter=rate', 'file', memory, `rate=${RATE}`]
    const server = await startProcess(nbdkit, () => answers({ path: socket }))
    undo.push(() => server.stop())
    fs.writeFileSync(image, '')
    const mounted = (): boolean => fs.statSync(image).size > 0
    const fuse: RunningProcess = await startProcess(['nbdfuse', image, `nbd+unix:///?socket=${socket}`], mounted)
    undo.push(() => fuse.stop())
    const device = check('losetup', '--show', '-f', image).trim()
    undo.push(() => check('losetup', '-d', device))
    fs.mkdirSync(place)
    check('mount', device, place)
    undo.push(() => check('umount', '-l', place))
    return { place, remove }
  } catch (error) {
    await remove()
    throw error
  }
}
