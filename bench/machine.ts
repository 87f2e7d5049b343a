// What every benchmark records of the machine and of the sources, and the questions to the system that they share.

import { spawnSync } from 'node:child_process'
import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'

export const MIB = 1024 * 1024
export const ROOT = path.resolve(import.meta.dirname, '..')

/** Where the images go: memory unless told, since programs are compared here, not disks. */
export const FOLDER = process.env['VARVE_BENCH_DIR'] ?? '/dev/shm'

/** Where the images go of what is measured with the disk: a folder on a real file system. */
export const DISK_FOLDER = process.env['VARVE_BENCH_DISK'] ?? os.tmpdir()

/** Of all results. Sources and load are taken before the first round: what is measured is what was there then. */
export interface Setting {
  readonly date: string
  readonly commit: string
  /** The sources differed from the commit. */
  readonly isModified: boolean
  /** Load average of the last minute before the first round: 0 on a quiet machine. */
  readonly loadBefore: number
  readonly machine: { readonly cores: number; readonly cpu: string; readonly kernel: string }
}

export function currentSetting(): Setting {
  return {
    date: new Date().toISOString(),
    commit: check('git', '-C', ROOT, 'rev-parse', 'HEAD').trim(),
    isModified: check('git', '-C', ROOT, 'status', '--porcelain', '--', 'src', 'bench').trim() !== '',
    loadBefore: os.loadavg()[0] ?? 0,
    machine: { cores: os.availableParallelism(), cpu: os.cpus()[0]?.model ?? 'unknown', kernel: os.release() },
  }
}

/** Runs a program that must succeed; returns its standard output. */
export function check(program: string, ...args: string[]): string {
  const result = spawnSync(program, args, { encoding: 'utf8', maxBuffer: 16 * MIB })
  if (result.status !== 0) throw new Error(`${program} ${args.join(' ')}: ${result.stderr || result.error?.message}`)
  return result.stdout
}

/** The first line of what a program says of its version; undefined where it is not installed. */
export function versionOf(program: string, option = '--version'): string | undefined {
  const result = spawnSync(program, [option], { encoding: 'utf8' })
  return result.status === 0 ? (result.stdout.split('\n')[0] ?? '') : undefined
}

/** How much of a file is in memory, from 0 to 1. */
export function residentShare(file: string): number {
  const allocated = fs.statSync(file).blocks * 512
  return allocated === 0 ? 1 : Number(check('fincore', '--bytes', '--noheadings', '--output', 'RES', file)) / allocated
}

const TMPFS_MAGIC = 0x01021994

/** True for a folder whose files are memory. */
export function isMemory(folder: string): boolean {
  return fs.statfsSync(folder).type === TMPFS_MAGIC
}

/** Resident memory of a process in MiB: now, and the most that it ever was. */
export function memoryOf(pid: number): { readonly now: number; readonly peak: number } {
  const status = fs.readFileSync(`/proc/${pid}/status`, 'utf8')
  const field = (name: string): number => Number(new RegExp(`^${name}:\\s+(\\d+) kB$`, 'm').exec(status)?.[1]) / 1024
  return { now: field('VmRSS'), peak: field('VmHWM') }
}
