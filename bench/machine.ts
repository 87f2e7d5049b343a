// What every benchmark records of the machine and of the sources, and helpers that all of them use.

import { spawnSync } from 'node:child_process'
import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'

export const MIB = 1024 * 1024
export const ROOT = path.resolve(import.meta.dirname, '..')

/** Where the images go: memory unless told, since programs are compared here, not disks. */
export const FOLDER = process.env['VARVE_BENCH_DIR'] ?? '/dev/shm'

/** Figures are published only when the reference agrees with itself this well; how well it did, the page says. */
export const NOISE_MAX = 0.25

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

/** The setting as a paragraph of the page. */
export function describeSetting(setting: Setting, versions: readonly string[], command: string): string {
  const { machine, date, commit, isModified, loadBefore } = setting
  return `Measured ${date.slice(0, 10)} at commit ${commit.slice(0, 12)}${isModified ? ' (with changes)' : ''} by \`${command}\`.
Machine: ${machine.cores} cores (${machine.cpu}), Linux ${machine.kernel}, load average ${loadBefore.toFixed(1)} before the run. ${versions.join('; ')}.`
}

/** Runs a program that must succeed; returns its standard output. */
export function check(program: string, ...args: string[]): string {
  const result = spawnSync(program, args, { encoding: 'utf8', maxBuffer: 16 * MIB })
  if (result.status !== 0) throw new Error(`${program} ${args.join(' ')}: ${result.stderr || result.error?.message}`)
  return result.stdout
}

/** How much of a file is in memory, from 0 to 1. */
export function residentShare(file: string): number {
  const allocated = fs.statSync(file).blocks * 512
  return allocated === 0 ? 1 : Number(check('fincore', '--bytes', '--noheadings', '--output', 'RES', file)) / allocated
}

export function median(values: readonly number[]): number {
  const sorted = values.toSorted((a, b) => a - b)
  const middle = Math.floor(sorted.length / 2)
  const upper = sorted[middle] ?? 0
  return sorted.length % 2 === 1 ? upper : ((sorted[middle - 1] ?? 0) + upper) / 2
}
