// Part "jobs": live commit, stream and mirror of a whole disk beside QEMU's, on the same images: how fast they copy with an idle
// guest, and what a guest that writes at random keeps while they run.

import fs from 'node:fs'
import path from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Load } from '../fio.ts'
import { Images, LIVE_JOBS, type LiveJob, type Rival, STORAGE_DAEMON_JOBS, VARVE_JOBS } from '../live-jobs.ts'
import { againLast, type Bench, type Contender, type Measurement, type Part, takeTurns } from '../part.ts'
import type { Ask, Row } from '../results.ts'
import { SteadyLoad } from '../steady-load.ts'

const GUEST: Load = { name: 'random write 4 KiB, depth 8', rw: 'randwrite', block: '4k', depth: 8 }

/** A job that does not end under the load is given up after so long, and the guest is measured until then. */
const JOB_MAX_SECONDS = 30

/** The disk on which each program does the same job first. */
const FIRST_MIB = 256

/** How long the guest is measured without a job. */
const ALONE_MS = 3000

const SUBJECT = VARVE_JOBS.program
const PEER = STORAGE_DAEMON_JOBS.program

/** What the job is; undefined for the guest alone. */
type Work = LiveJob | undefined

interface Place {
  readonly title: string
  readonly folder: string
}

export const JOBS: Part = {
  name: 'jobs',
  title: 'Live commit, stream and mirror',
  about: ({
    extent,
  }) => `A qcow2 disk of ${extent.imageMiB} MiB full of random data, all of it in the page cache: committed into a full base, streamed
into an empty overlay, mirrored to a new image on which it then goes on. Each program does the same job on a disk of
${FIRST_MIB} MiB first, as one that has run for a while. A job counts as over when its result is synced. Idle: how fast it is. Under load: what ${GUEST.name}, from fio is served while the job runs, and how long it runs, of which ${JOB_MAX_SECONDS} s means that it was given up.`,
  async measure(bench) {
    const rows: Row[] = []
    for (const place of [
      { title: 'in memory', folder: bench.folder },
      { title: 'on disk', folder: bench.diskFolder },
    ]) {
      const works: readonly Work[] = LIVE_JOBS.filter((job) => bench.wants(`${job}, ${place.title}`))
      if (works.length === 0) continue
      const folder = path.join(place.folder, 'jobs')
      fs.mkdirSync(folder)
      rows.push(...(await measurePlace(bench, { ...place, folder }, works)))
      fs.rmSync(folder, { recursive: true })
    }
    return rows
  },
}

async function measurePlace(bench: Bench, place: Place, works: readonly Work[]): Promise<Row[]> {
  const rivals = [VARVE_JOBS, STORAGE_DAEMON_JOBS].filter(({ program, version }) => bench.has(program, version()))
  const images = new Images(place.folder, bench.imageMiB)
  const first = new Images(place.folder, FIRST_MIB, 'first-')
  const idle: Row[] = []
  const loaded: Row[] = []
  const times: Row[] = []
  for (const work of [...works, undefined]) {
    const name = `${work ?? 'no job'}, ${place.title}`
    if (work !== undefined) {
      const contenders = againLast(rivals, SUBJECT).map((rival) =>
        idleContender({ images, first }, work, rival, bench.imageMiB),
      )
      const figures = await takeTurns(contenders, bench.rounds, `${name}, MiB a second`)
      const asks = [{ of: PEER, atLeast: 1.2 }]
      idle.push({ table: 'idle guest', name, unit: 'MiB a second', subject: SUBJECT, figures, asks })
    }
    const seconds = rivals.map(({ program }) => ({ program, rounds: [] as number[] }))
    const contenders = rivals.map((rival, index) =>
      loadedContender({ images, first }, work, rival, (took) => seconds[index]?.rounds.push(took)),
    )
    const figures = await takeTurns(contenders, bench.rounds, `${name}, guest's requests a second`)
    const asks: Ask[] = work === undefined ? [] : [{ of: PEER, atLeast: 1.5 }]
    loaded.push({ table: 'guest under load', name, unit: 'a second', subject: SUBJECT, figures, asks })
    if (work === undefined) continue
    const ends = [{ atMost: JOB_MAX_SECONDS - 1 }]
    times.push({ table: 'job under load', name, unit: 's', subject: SUBJECT, figures: seconds, asks: ends })
  }
  return [...idle, ...loaded, ...times]
}

interface Both {
  readonly images: Images
  readonly first: Images
}

function idleContender(images: Both, job: LiveJob, rival: Rival, sizeMiB: number): Contender {
  return {
    program: rival.program,
    measure: () =>
      withServed(images, job, rival, async (_uri, _folder, work) => {
        const began = performance.now()
        await work()
        return { value: (sizeMiB * 1000) / (performance.now() - began) }
      }),
  }
}

function loadedContender(images: Both, job: Work, rival: Rival, took: (seconds: number) => void): Contender {
  return {
    program: rival.program,
    measure: () =>
      // The guest alone has the disk that a commit begins with.
      withServed(images, job ?? 'commit', rival, async (uri, folder, work) => {
        const load = await SteadyLoad.start(uri, GUEST, folder)
        const fromMs = Date.now()
        await (job === undefined ? sleep(ALONE_MS) : orGivenUp(work()))
        const toMs = Date.now()
        took((toMs - fromMs) / 1000)
        return { value: Math.round((await load.stop())(fromMs, toMs).iops) }
      }),
  }
}

/** A job that is given up fails when its server ends. */
async function orGivenUp(work: Promise<void>): Promise<void> {
  work.catch(() => undefined)
  await Promise.race([work, sleep(JOB_MAX_SECONDS * 1000, undefined, { ref: false })])
}

async function withServed(
  { images, first }: Both,
  job: LiveJob,
  rival: Rival,
  measure: (uri: string, folder: string, work: () => Promise<void>) => Promise<Measurement>,
): Promise<Measurement> {
  const stage = images.prepare(job)
  const firstStage = first.prepare(job)
  try {
    const served = await rival.serve(job, stage, firstStage)
    try {
      return await measure(served.uri, stage.folder, served.work)
    } finally {
      await served.stop()
    }
  } finally {
    images.discard(stage)
    first.discard(firstStage)
  }
}
