// `varve serve` for a benchmark: in a home of its own, with disks that are added over its API.

import path from 'node:path'
import { ApiClient } from '../src/api/client.ts'
import { homeAt } from '../src/engine/home.ts'
import type { ImageFormat } from './images.ts'
import { MIB } from './machine.ts'
import { type RunningProcess, startProcess } from './process.ts'
import { VARVE_PROGRAM } from './servers.ts'

export interface Daemon extends RunningProcess {
  readonly api: ApiClient
}

/** Starts it with its home in the folder. */
export async function startDaemon(folder: string, ...options: string[]): Promise<Daemon> {
  const home = path.join(folder, 'home')
  const api = new ApiClient(homeAt(home).apiSocket)
  const isReady = (): Promise<boolean> =>
    api.call('showStatus', {}, {}).then(
      () => true,
      () => false,
    )
  const running = await startProcess([...VARVE_PROGRAM, 'serve', '--home', home, ...options], isReady)
  return { ...running, api }
}

/** Adds an image under its file's name, with a size makes it first; the URI of its export. */
export async function addDisk(daemon: Daemon, image: string, format: ImageFormat, sizeMiB?: number): Promise<string> {
  const size = sizeMiB === undefined ? {} : { size: sizeMiB * MIB }
  const { uri } = await daemon.api.call(
    'addDisk',
    {},
    { name: `disk-${path.parse(image).name}`, image, format, ...size },
  )
  if (uri === undefined) throw new Error(`${image} is not served`)
  return uri
}
