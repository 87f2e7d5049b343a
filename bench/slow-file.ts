// A file whose every read and write takes fifty milliseconds: nbdkit's delay filter over a file in memory, mounted by nbdfuse.

import fs from 'node:fs'
import path from 'node:path'
import { versionOf } from './machine.ts'
import { answers, type RunningProcess, startProcess } from './process.ts'

const DELAY = '50ms'

export interface SlowFile {
  readonly file: string
  /** Takes it away. Nobody may have it open. */
  remove(): Promise<void>
}

/** Why there can be none on this machine; undefined when there can. */
export function whyNoSlowFile(): string | undefined {
  if (!fs.existsSync('/dev/fuse')) return 'there is no /dev/fuse'
  const missing = ['nbdkit', 'nbdfuse'].find((program) => versionOf(program) === undefined)
  return missing === undefined ? undefined : `${missing} is not installed`
}

/** Makes one in an empty folder. */
export async function makeSlowFile(folder: string, sizeMiB: number): Promise<SlowFile> {
  const socket = path.join(folder, 'slow.sock')
  const mountPoint = path.join(folder, 'slow')
  const file = path.join(mountPoint, 'slow.raw')
  fs.mkdirSync(mountPoint)
  const processes: RunningProcess[] = []
  const delays = [`rdelay=${DELAY}`, `wdelay=${DELAY}`]
  const nbdkit = ['nbdkit', '-f', '-U', socket, '--filter=delay', 'memory', `${sizeMiB}M`, ...delays]
  processes.push(await startProcess(nbdkit, () => answers({ path: socket })))
  try {
    const nbdfuse = ['nbdfuse', file, `nbd+unix:///?socket=${socket}`]
    processes.push(await startProcess(nbdfuse, () => fs.existsSync(file)))
  } catch (error) {
    await processes[0]?.stop()
    throw error
  }
  return {
    file,
    remove: async () => {
      for (const one of processes.toReversed()) await one.stop()
    },
  }
}
