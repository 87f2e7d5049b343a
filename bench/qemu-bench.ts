// `qemu-img bench` as the client: QEMU's own block layer asks for 4 KiB at a time, of an image or of an NBD server. It goes
// through the image in large steps, so that no two requests are near each other.

import { execFile } from 'node:child_process'
import { promisify } from 'node:util'
import type { Measurement } from './part.ts'

const run = promisify(execFile)

/** Not a multiple of a cluster, nor of anything else that caches care for. */
const STEP = 4096 * 33

export interface QemuLoad {
  readonly name: string
  readonly depth: number
  /** How many, in all. */
  readonly requests: number
  readonly isWrite?: boolean
}

/** `target` is what qemu-img takes for an image. Requests a second. */
export async function measureByQemu(target: readonly string[], load: QemuLoad): Promise<Measurement> {
  const args = ['bench', '-c', String(load.requests), '-d', String(load.depth), '-s', '4096', '-S', String(STEP)]
  const { stdout } = await run('qemu-img', [...args, ...(load.isWrite === true ? ['-w'] : []), ...target])
  const seconds = Number(/Run completed in ([\d.]+) seconds/.exec(stdout)?.[1])
  if (!(seconds > 0)) throw new Error(`qemu-img bench ${target.join(' ')} said: ${stdout}`)
  return { value: Math.round(load.requests / seconds) }
}
