// What the benchmarks of backups share: a disk that changes, sizes of repositories, times of commands.

import fs from 'node:fs'
import path from 'node:path'
import { Random } from '../src/base/random.ts'
import { connectNbd } from '../src/nbd/client.ts'

const GRANULE = 4096

/** Writes one granule in so many anew, through the daemon, at places and with data of the day's own; how many bytes. */
export async function changeSome(uri: string, day: number, oneIn: number): Promise<number> {
  const random = new Random(day)
  const client = await connectNbd(uri)
  try {
    const granules = Math.floor(client.size / GRANULE)
    const places = new Set<number>()
    while (places.size < granules / oneIn) places.add(random.below(granules))
    const block = Buffer.alloc(GRANULE)
    for (const place of places) await client.write(place * GRANULE, GRANULE, Buffer.from(random.fill(block)), 0, 0)
    await client.flush()
    return places.size * GRANULE
  } finally {
    await client.close()
  }
}

/** What it printed, and how long it took. */
export function timed(run: () => string): { readonly output: string; readonly seconds: number } {
  const began = performance.now()
  const output = run()
  return { output, seconds: (performance.now() - began) / 1000 }
}

/** Bytes of all files in a folder. */
export function sizeOf(folder: string): number {
  const files = fs.readdirSync(folder, { recursive: true, withFileTypes: true }).filter((entry) => entry.isFile())
  return files.reduce((sum, entry) => sum + fs.statSync(path.join(entry.parentPath, entry.name)).size, 0)
}
