// QEMU's storage daemon with one qcow2 image and one NBD export, for a test: to write into the image as QEMU does, and to show
// its persistent bitmaps.

import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import fs from 'node:fs'
import path from 'node:path'
import type { TestContext } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import { peer } from './peer.ts'
import { tempFolder } from './temp.ts'

/** Half-open range of bytes. */
export type Range = readonly [start: number, end: number]

const PATIENCE_MS = 20_000

export class StorageDaemon {
  readonly uri: string
  readonly #child: ChildProcess

  private constructor(uri: string, child: ChildProcess) {
    this.uri = uri
    this.#child = child
  }

  /** Starts it; returns when it serves. With `bitmap` the export shows that one, and the image is not written. */
  static async start(t: TestContext, image: string, bitmap?: string): Promise<StorageDaemon> {
    const folder = tempFolder(t)
    const socket = path.join(folder, 'nbd.sock')
    const pidFile = path.join(folder, 'pid')
    const isWritable = bitmap === undefined
    const child = spawn(
      'qemu-storage-daemon',
      [
        '--pidfile',
        pidFile,
        '--blockdev',
        `driver=file,node-name=file,filename=${image},read-only=${isWritable ? 'off' : 'on'}`,
        '--blockdev',
        `driver=qcow2,node-name=disk,file=file,read-only=${isWritable ? 'off' : 'on'}`,
        '--nbd-server',
        `addr.type=unix,addr.path=${socket}`,
        '--export',
        `type=nbd,id=e,node-name=disk,name=disk,writable=${isWritable ? 'on' : 'off'}${isWritable ? '' : `,bitmaps.0=${bitmap}`}`,
      ],
      { stdio: ['ignore', 'inherit', 'inherit'] },
    )
    t.after(() => child.kill('SIGKILL'))
    for (let waited = 0; !fs.existsSync(pidFile); waited += 10) {
      if (child.exitCode !== null || waited > PATIENCE_MS) throw new Error('qemu-storage-daemon did not start')
      await sleep(10)
    }
    return new StorageDaemon(`nbd+unix:///disk?socket=${socket}`, child)
  }

  /** SIGTERM has it end cleanly and save its bitmaps; SIGKILL does not. */
  async stop(signal: 'SIGTERM' | 'SIGKILL' = 'SIGTERM'): Promise<void> {
    const ended = once(this.#child, 'exit')
    this.#child.kill(signal)
    await ended
  }
}

/** What QEMU says is dirty in a bitmap of the image: ranges in order, joined where they touch. */
export async function dirtyRangesOfQemu(t: TestContext, image: string, bitmap: string): Promise<Range[]> {
  const daemon = await StorageDaemon.start(t, image, bitmap)
  const map = peer('nbdinfo', '--json', `--map=qemu:dirty-bitmap:${bitmap}`, daemon.uri)
  await daemon.stop()
  const extents = JSON.parse(map) as { offset: number; length: number; type: number }[]
  return joined(extents.filter(({ type }) => type !== 0).map(({ offset, length }) => [offset, offset + length]))
}

/** Ranges in order as few as they can be. */
export function joined(ranges: readonly Range[]): Range[] {
  const result: [number, number][] = []
  for (const [start, end] of ranges.toSorted((a, b) => a[0] - b[0])) {
    const last = result.at(-1)
    if (last !== undefined && start <= last[1]) last[1] = Math.max(last[1], end)
    else result.push([start, end])
  }
  return result
}
