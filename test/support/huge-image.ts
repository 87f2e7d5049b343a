// The life of a qcow2 image of 2^30 clusters, in a process of its own so that its peak memory is its own too: created, written at
// random places, closed, checked, and mapped from end to end. Prints what it saw as one line of JSON.
//
//   node test/support/huge-image.ts PATH WRITES SEED

import assert from 'node:assert/strict'
import fs from 'node:fs'
import { Random } from '../../src/base/random.ts'
import { roundDown } from '../../src/base/round.ts'
import { HOLE } from '../../src/block/device.ts'
import { createQcow2 } from '../../src/format/qcow2/create.ts'
import { openQcow2, type Qcow2Image } from '../../src/format/qcow2/image.ts'
import { realHost } from '../../src/host/real.ts'

const TIB = 2 ** 40
const BLOCK = 4096

/** Seconds of each step, and what was found. */
export interface HugeReport {
  readonly seconds: Readonly<Record<string, number>>
  readonly peakMiB: number
  readonly fileMiB: number
  readonly corruptions: number
  readonly leaks: number
  readonly allocatedClusters: number
  /** Pieces of the map with data, and bytes of the whole map. */
  readonly dataExtents: number
  readonly mappedBytes: number
}

const [file = '', writes = '10000', seed = '1'] = process.argv.slice(2)
const seconds: Record<string, number> = {}

async function timed<T>(name: string, work: () => Promise<T>): Promise<T> {
  const start = performance.now()
  const result = await work()
  seconds[name] = Math.round(performance.now() - start) / 1000
  return result
}

async function writeAtRandom(image: Qcow2Image, random: Random): Promise<Set<number>> {
  const clusters = new Set<number>()
  const bytes = random.fill(Buffer.alloc(BLOCK))
  for (let i = 0; i < Number(writes); i++) {
    const offset = roundDown(random.below(image.size), BLOCK)
    clusters.add(Math.floor(offset / image.clusterSize))
    await image.write(offset, BLOCK, bytes, 0, 0)
  }
  return clusters
}

function peakMiB(): number {
  const line = /^VmHWM:\s+(\d+) kB$/m.exec(fs.readFileSync('/proc/self/status', 'utf8'))
  return Math.round(Number(line?.[1]) / 1024)
}

await timed('create', () => createQcow2(realHost, file, { size: 64 * TIB }))
const image = await openQcow2(realHost, file, { name: 'huge' })
await image.setAccess('write')
const clusters = await timed('write', () => writeAtRandom(image, new Random(Number(seed))))
await timed('close', () => image.close())

const again = await openQcow2(realHost, file, { name: 'huge' })
const check = await timed('check', () => again.check())
let dataExtents = 0
let mappedBytes = 0
await timed('map', async () => {
  await again.extents(0, again.size, (length, extent) => {
    if ((extent & HOLE) === 0) dataExtents++
    mappedBytes += length
    return true
  })
})
await again.close()
assert.equal(check.allocatedClusters, clusters.size)

const { corruptions, leaks, allocatedClusters } = check
const fileMiB = Math.round(fs.statSync(file).size / 2 ** 20)
const report: HugeReport = {
  seconds,
  peakMiB: peakMiB(),
  fileMiB,
  corruptions,
  leaks,
  allocatedClusters,
  dataExtents,
  mappedBytes,
}
process.stdout.write(`${JSON.stringify(report)}\n`)
