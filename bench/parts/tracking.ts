// Part "tracking": what a bitmap costs the guest. The same disk in the same daemon is written at random with a bitmap that records and
// without any, in turn: with the regions of its dirty log warm, and from the first write on, which in each region waits for a sync.

import path from 'node:path'
import { DIRTYLOG_REGION } from '../../src/base/limits.ts'
import { connectNbd } from '../../src/nbd/client.ts'
import { addDisk, type Daemon, startDaemon } from '../daemon.ts'
import { measure, RANDOM_WRITE, RANDOM_WRITE_1 } from '../fio.ts'
import { type ImageFormat, makeImage, settle } from '../images.ts'
import { MIB } from '../machine.ts'
import { againLast, type Bench, type Part, takeTurns } from '../part.ts'
import type { Row } from '../results.ts'
import { VARVE } from '../servers.ts'

const BITMAP = 'changed'
const OFF = 'no bitmap'
const ON = 'with a bitmap'
const BLOCK = 4096

/** What is asked of the writes with a bitmap, of those without. */
const CASES = [
  { title: 'warm', isWarm: true, atLeast: 0.97 },
  { title: 'from the first write on', isWarm: false, atLeast: 0.9 },
] as const

interface Tracked {
  readonly daemon: Daemon
  readonly image: string
  readonly disk: string
  readonly uri: string
}

export const TRACKING: Part = {
  name: 'tracking',
  title: 'What a bitmap costs',
  extent: { rounds: 7, seconds: 2 },
  about: ({
    extent,
  }) => `A disk of ${extent.imageMiB} MiB full of random data, in the page cache, in one daemon whose dirty log lies on a disk: written with a
bitmap of 4 KiB that records and without any, in turn. "Warm": a write to each region of the log came before. "From the first write
on": none did, so that the first write to each of ${Math.ceil((extent.imageMiB * MIB) / DIRTYLOG_REGION)} regions is part of what is measured. The
bitmap begins empty in every round.`,
  async measure(bench) {
    if (!bench.has(VARVE.name, VARVE.version())) return []
    const rows: Row[] = []
    for (const format of ['raw', 'qcow2'] as const) rows.push(...(await measureFormat(bench, format)))
    return rows
  },
}

async function measureFormat(bench: Bench, format: ImageFormat): Promise<Row[]> {
  const wanted = CASES.flatMap((one) =>
    [RANDOM_WRITE, RANDOM_WRITE_1].flatMap((load) => {
      const name = `${format}, ${load.name}, ${one.title}`
      return bench.wants(name) ? [{ ...one, load, name }] : []
    }),
  )
  if (wanted.length === 0) return []
  const image = path.join(bench.folder, `tracked.${format}`)
  makeImage(image, format, bench.imageMiB)
  const daemon = await startDaemon(path.join(bench.diskFolder, format))
  try {
    const tracked = { daemon, image, disk: 'disk-tracked', uri: await addDisk(daemon, image, format) }
    const rows: Row[] = []
    for (const { name, load, isWarm, atLeast } of wanted) {
      const contender = (program: string, isOn: boolean) => ({
        program,
        measure: async () => {
          await prepare(tracked, isOn, isWarm)
          return measure(tracked.uri, load, bench.seconds)
        },
      })
      const contenders = againLast([contender(ON, true), contender(OFF, false)], OFF)
      const figures = await takeTurns(contenders, bench.rounds, name)
      const asks = [{ of: OFF, atLeast }]
      rows.push({ table: 'random writes', name, unit: 'a second', subject: ON, figures, asks })
    }
    return rows
  } finally {
    await daemon.stop()
  }
}

/** With a bitmap that is empty, or without one; the log's regions are all cold, or all warm. */
async function prepare({ daemon, image, disk, uri }: Tracked, isOn: boolean, isWarm: boolean): Promise<void> {
  settle(image, true)
  const { bitmaps } = await daemon.api.call('showDisk', { disk }, {})
  const old = bitmaps.some(({ name }) => name === BITMAP) ? [{ edit: 'remove' as const, name: BITMAP }] : []
  const edits = [...old, ...(isOn ? [{ edit: 'add' as const, name: BITMAP }] : [])]
  if (edits.length > 0) await daemon.api.call('editBitmaps', { disk }, { edits })
  if (!isWarm) return
  const client = await connectNbd(uri)
  try {
    const block = Buffer.alloc(BLOCK, 1)
    const writes: (Promise<void> | undefined)[] = []
    for (let at = 0; at < client.size; at += DIRTYLOG_REGION) writes.push(client.write(at, BLOCK, block, 0, 0))
    await Promise.all(writes)
  } finally {
    await client.close()
  }
}
