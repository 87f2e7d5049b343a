// varve backup --from and --to-file: backups that this command makes itself, by a view of the daemon's disks (view-session.ts), into a
// repository that it opens (backup-client.ts) or an image file (backup-file.ts).

import path from 'node:path'
import { formatSize } from '../base/size.ts'
import { BlockError } from '../block/error.ts'
import type { Format } from '../chain/open.ts'
import { checkpointWish } from '../engine/checkpoints.ts'
import { TERMS } from '../job/terms.ts'
import { backUpFrom } from './backup-client.ts'
import { backUpToFile } from './backup-file.ts'
import { describeBackup } from './backup-report.ts'
import { print, warn } from './context.ts'
import type { Cli } from './daemon-context.ts'
import { type PeerOptions, withCredentials } from './peer-options.ts'
import { type RepositoryFlags, withRepository } from './repository.ts'
import { type TermOptions, termsOf } from './terms.ts'

export interface ElsewhereOptions extends TermOptions, PeerOptions, RepositoryFlags {
  readonly repo?: string
  readonly from?: string
  readonly toFile?: string
  readonly format?: Format
  readonly full?: boolean
  readonly prove?: number
  readonly since?: string
  readonly checkpoint?: string
  readonly lease?: number
  readonly wait: boolean
}

/** How long a view stays without a request unless told, in seconds. */
const LEASE = 600

/** Of machines at one moment. Kind 'invalid-argument' for options that do not go together. */
export async function backupElsewhere(cli: Cli, machines: readonly string[], options: ElsewhereOptions): Promise<void> {
  checkOptions(options)
  const from =
    options.from === undefined ? `varve+unix://${cli.home}/run/api.sock` : withCredentials(options.from, options)
  const leaseMs = (options.lease ?? LEASE) * 1000
  if (options.toFile !== undefined) return toFile(cli, { from, machines, leaseMs, file: options.toFile }, options)
  const { full = false, prove } = options
  const marks = checkpointWish({ ...options, full })
  const wish = { from, machines, full, prove, leaseMs, marks, terms: termsOf(options) }
  const outcome = await withRepository(options.repo as string, options, (repository) => backUpFrom(repository, wish))
  print(cli, outcome, ({ details }) => describeBackup(details, true))
  if (!outcome.isCompleted) warnUntold('The backup')
}

interface ToFile {
  readonly from: string
  readonly machines: readonly string[]
  readonly leaseMs: number
  readonly file: string
}

async function toFile(cli: Cli, { from, machines, leaseMs, file }: ToFile, options: ElsewhereOptions): Promise<void> {
  const [disk, ...others] = machines
  if (disk === undefined || others.length > 0)
    throw new BlockError('invalid-argument', 'a file holds one disk: name one, or back up several into a repository')
  const { full = false, format = 'qcow2' } = options
  const marks = checkpointWish({ ...options, full })
  const outcome = await backUpToFile({ from, disk, file: path.resolve(file), format, full, leaseMs, marks })
  print(cli, outcome, ({ kind, reason, readBytes }) =>
    [outcome.file, `${disk}: ${kind} (${reason})`, `read ${formatSize(readBytes)}`].join('\n'),
  )
  if (!outcome.isCompleted) warnUntold('The file')
}

function warnUntold(what: string): void {
  warn(`${what} is whole, but the daemon was not told: the next one copies again what changed since the one before`)
}

function checkOptions({ repo, toFile: file, prove, format, onError, finalize, wait, speed }: ElsewhereOptions): void {
  const bad = (message: string): BlockError => new BlockError('invalid-argument', message)
  if ((repo === undefined) === (file === undefined)) throw bad('say where to: either --repo or --to-file')
  if (file !== undefined && prove !== undefined) throw bad('--prove compares with a backup in a repository')
  if (file !== undefined && speed > 0) throw bad('--speed goes with --repo: a file is written as fast as it can be')
  if (file === undefined && format !== undefined) throw bad('-f is the format of a file: say --to-file')
  if (onError === 'stop' || onError === 'enospc')
    throw bad(`nobody could resume a backup that this command makes: --on-error ${ownPolicies().join(' or ')}`)
  if (finalize === 'manual' || !wait)
    throw bad('a backup that this command makes ends with it: --no-wait and --finalize are for others')
}

function ownPolicies(): readonly string[] {
  return TERMS.backup.onError.filter((policy) => policy === 'report' || policy === 'ignore')
}
