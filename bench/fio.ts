// One measurement: fio's nbd engine against one server, one workload.

import { execFile } from 'node:child_process'
import { promisify } from 'node:util'

export interface Workload {
  readonly name: string
  readonly rw: 'randread' | 'randwrite' | 'read' | 'write'
  readonly block: string
  readonly depth: number
  /** What DESIGN.md asks for: at least so many times qemu-nbd. */
  readonly target: number
}

export const WORKLOADS: readonly Workload[] = [
  { name: 'random read 4 KiB, depth 32', rw: 'randread', block: '4k', depth: 32, target: 1.5 },
  { name: 'random write 4 KiB, depth 32', rw: 'randwrite', block: '4k', depth: 32, target: 1.5 },
  { name: 'random read 4 KiB, depth 1', rw: 'randread', block: '4k', depth: 1, target: 1 },
  { name: 'random write 4 KiB, depth 1', rw: 'randwrite', block: '4k', depth: 1, target: 1 },
  { name: 'sequential read 1 MiB, depth 4', rw: 'read', block: '1M', depth: 4, target: 1.2 },
  { name: 'sequential write 1 MiB, depth 4', rw: 'write', block: '1M', depth: 4, target: 1.2 },
]

export interface Measurement {
  readonly iops: number
  /** 99th percentile of the completion latency, microseconds. */
  readonly p99Us: number
}

interface FioSide {
  readonly iops: number
  readonly clat_ns: { readonly percentile?: Readonly<Record<string, number>> }
}

const run = promisify(execFile)

/** Runs fio for `seconds` after half a second of warming up. */
export async function measure(uri: string, workload: Workload, seconds: number): Promise<Measurement> {
  const args = `--name=bench --ioengine=nbd --uri=${uri} --rw=${workload.rw} --bs=${workload.block}
    --iodepth=${workload.depth} --runtime=${seconds} --ramp_time=500ms --time_based
    --randrepeat=0 --norandommap --output-format=json`.split(/\s+/)
  const { stdout } = await run('fio', args, { maxBuffer: 16 * 1024 * 1024 })
  const report = JSON.parse(stdout.slice(stdout.indexOf('{'))) as {
    jobs: { error: number; read: FioSide; write: FioSide }[]
  }
  const job = report.jobs[0]
  if (job === undefined || job.error !== 0) throw new Error(`fio failed on ${uri}: error ${job?.error}`)
  const side = workload.rw.endsWith('read') ? job.read : job.write
  return { iops: side.iops, p99Us: (side.clat_ns.percentile?.['99.000000'] ?? 0) / 1000 }
}
