// fio's nbd engine as the client: random or sequential load on one export or on several at once.

import { execFile } from 'node:child_process'
import { promisify } from 'node:util'

export interface Load {
  readonly name: string
  readonly rw: 'randread' | 'randwrite' | 'read' | 'write'
  readonly block: string
  readonly depth: number
  /** Requests a second of each export, at most. */
  readonly limit?: number
}

export const RANDOM_READ: Load = { name: 'random read 4 KiB, depth 32', rw: 'randread', block: '4k', depth: 32 }
export const RANDOM_WRITE: Load = { name: 'random write 4 KiB, depth 32', rw: 'randwrite', block: '4k', depth: 32 }
export const RANDOM_READ_1: Load = { name: 'random read 4 KiB, depth 1', rw: 'randread', block: '4k', depth: 1 }
export const RANDOM_WRITE_1: Load = { name: 'random write 4 KiB, depth 1', rw: 'randwrite', block: '4k', depth: 1 }
export const SEQUENTIAL_READ: Load = { name: 'sequential read 1 MiB, depth 4', rw: 'read', block: '1M', depth: 4 }
export const SEQUENTIAL_WRITE: Load = { name: 'sequential write 1 MiB, depth 4', rw: 'write', block: '1M', depth: 4 }

export function isWrite(load: Load): boolean {
  return load.rw.endsWith('write')
}

/** Of one export. */
export interface Served {
  readonly iops: number
  /** 99th percentile of the completion latency, in microseconds. */
  readonly p99Us: number
}

interface FioSide {
  readonly iops: number
  readonly clat_ns: { readonly percentile?: Readonly<Record<string, number>> }
}

const run = promisify(execFile)

const NOBODY = 65_534

/**
 * Loads all exports at once for `seconds`, after a fifth of a second of warming up; answers in their order. libnbd, on which fio's
 * engine stands, takes certificates from .pki/libnbd in the `home` of a user who is not root.
 */
export async function measureAll(
  uris: readonly string[],
  load: Load,
  seconds: number,
  home?: string,
): Promise<Served[]> {
  const limit = load.limit === undefined ? '' : `--rate_iops=${load.limit} --rate_process=poisson`
  const all = `--name=global --ioengine=nbd --rw=${load.rw} --bs=${load.block} --iodepth=${load.depth} ${limit}
    --runtime=${seconds} --ramp_time=200ms --time_based --randrepeat=0 --norandommap --output-format=json`
  const jobs = uris.flatMap((uri, index) => [`--name=${index}`, `--uri=${uri}`])
  const { stdout } = await run('fio', [...all.split(/\s+/).filter((text) => text !== ''), ...jobs], {
    maxBuffer: 16 * 1024 * 1024,
    ...(home === undefined ? {} : { env: { ...process.env, HOME: home }, cwd: home }),
    ...(home !== undefined && process.getuid?.() === 0 ? { uid: NOBODY, gid: NOBODY } : {}),
  })
  const report = JSON.parse(stdout.slice(stdout.indexOf('{'))) as {
    jobs: { error: number; read: FioSide; write: FioSide }[]
  }
  if (report.jobs.length !== uris.length) throw new Error(`fio did ${report.jobs.length} of ${uris.length} jobs`)
  return report.jobs.map((job, index) => {
    if (job.error !== 0) throw new Error(`fio failed on ${uris[index]}: error ${job.error}`)
    const side = isWrite(load) ? job.write : job.read
    return { iops: side.iops, p99Us: (side.clat_ns.percentile?.['99.000000'] ?? 0) / 1000 }
  })
}

/** Loads one export. */
export async function measure(
  uri: string,
  load: Load,
  seconds: number,
  home?: string,
): Promise<{ value: number; p99Us: number }> {
  const [served] = await measureAll([uri], load, seconds, home)
  return { value: Math.round(served?.iops ?? 0), p99Us: served?.p99Us ?? 0 }
}
