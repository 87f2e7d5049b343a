// varve repo: makes repositories, says what is in them, prunes, checks and copies. None of it needs the daemon, and all of it may run
// while daemons back up into the repository.

import { randomBytes } from 'node:crypto'
import { appendFileSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { type Command, Option } from 'commander'
import { formatSize } from '../base/size.ts'
import { BlockError, toBlockError } from '../block/error.ts'
import type { BackupList, CheckReport, PruneReport, Retention } from '../repository/repository.ts'
import { absoluteLocation, initRepositoryAt, openRepositoryAt, readCredential } from '../shard/repositories.ts'
import { print, table } from './context.ts'
import { cliOf } from './daemon-context.ts'
import { Progress } from './progress.ts'
import { type RepositoryFlags, withKeys, withRepository } from './repository.ts'

export function addRepoCommands(program: Command): void {
  const repo = program.command('repo').description('backup repositories')
  withKeys(
    repo
      .command('init <folder>')
      .description('make a repository in an empty or new folder; with a key, an encrypted one'),
  ).action(init)
  withKeys(repo.command('list <folder>').description('the backups in it, newest last')).action(listBackups)
  withKeys(repo.command('stats <folder>').description('what it holds, and what that costs')).action(stats)
  withKeys(
    repo
      .command('check <folder>')
      .description('check all of its structure, and every byte or a part of them when asked to'),
  )
    .option('--read-data', 'read every byte')
    .addOption(
      new Option('--sample <percent>', 'read so much of the packs, chosen at random')
        .argParser(percentOf)
        .conflicts('readData'),
    )
    .option('--resume <file>', 'note in this file what was read, and go on from there')
    .option('--repair', 'move what is good out of what is damaged, and take lost data from other copies')
    .action(check)
  withKeys(
    repo.command('forget <folder> <backup...>').description('give backups up; their space comes back with a prune'),
  ).action(forget)
  withKeys(repo.command('tag <folder> <backup>').description('add and remove tags of a backup'))
    .option('--add <tag...>', 'letters, digits, _ and -')
    .option('--remove <tag...>')
    .action(tag)
  addPrune(repo)
  withKeys(
    repo
      .command('copy <source> <target> [backup...]')
      .description('copy the backups that the target does not have, or these'),
  )
    .option('--target-passphrase-file <file>', 'what opens the target, when it is another')
    .option('--target-key-file <file>')
    .action(copy)
  addKeys(repo)
}

function addPrune(repo: Command): void {
  const keep = (name: string, what: string): Option => new Option(`--keep-${name} <n>`, what).argParser(countOf)
  withKeys(
    repo.command('prune <folder>').description('forget what a policy does not keep, and remove what no backup needs'),
  )
    .addOption(keep('last', 'the last so many backups of each machine'))
    .addOption(keep('hourly', 'the last one of so many hours'))
    .addOption(keep('daily', 'of days'))
    .addOption(keep('weekly', 'of weeks, from Monday'))
    .addOption(keep('monthly', 'of months'))
    .addOption(keep('yearly', 'of years'))
    .option('--keep-tag <tag...>', 'whatever has one of these tags')
    .addOption(
      new Option('--repack-below <percent>', 'rewrite packs of which less is needed')
        .argParser(percentOf)
        .default(0.7, '70'),
    )
    .addOption(new Option('--stale-after <minutes>', 'give up clients that were silent for so long').argParser(countOf))
    .option('--dry-run', 'say what would be done')
    .action(prune)
}

function addKeys(repo: Command): void {
  const key = repo.command('key').description('what opens an encrypted repository')
  withKeys(key.command('list <folder>').description('its keys')).action(listKeys)
  withKeys(key.command('add <folder>').description('let another passphrase or key file open it'))
    .addOption(new Option('--new-passphrase-file <file>').conflicts('newKeyFile'))
    .option('--new-key-file <file>')
    .option('--label <text>', 'for people', 'added')
    .action(addKey)
  withKeys(key.command('remove <folder> <key>').description('one of its keys opens it no more')).action(removeKey)
  key.command('new <file>').description('make a file with a new random key').action(newKeyFile)
}

async function init(folder: string, flags: RepositoryFlags, command: Command): Promise<void> {
  const repository = await initRepositoryAt(folder, flags)
  await repository.close()
  print(cliOf(command), { id: repository.id, location: absoluteLocation(folder) }, ({ id }) => `repository ${id}`)
}

/** Also what `varve backups` does. */
export async function listBackups(folder: string, flags: RepositoryFlags, command: Command): Promise<void> {
  const list: BackupList = await withRepository(folder, flags, (repository) => repository.list())
  const { backups, damaged, tags } = list
  const rows = backups.map((row) => ({ ...row, tags: tags.get(row.id) ?? [] }))
  print(cliOf(command), rows, () =>
    table(
      ['BACKUP', 'MOMENT', 'KIND', 'DISKS', 'SIZE', 'STORED', 'TAGS'],
      rows.map((row) => [
        row.id,
        new Date(row.moment).toISOString(),
        row.kind,
        row.disks.map((disk) => disk.name).join(' '),
        formatSize(row.disks.reduce((sum, disk) => sum + disk.size, 0)),
        formatSize(row.storedBytes),
        row.tags.join(' '),
      ]),
    ),
  )
  const [first] = damaged
  if (first !== undefined) throw new BlockError('corrupt', `${damaged.length} more cannot be read: ${first.reason}`)
}

async function stats(folder: string, flags: RepositoryFlags, command: Command): Promise<void> {
  const found = await withRepository(folder, flags, (repository) => repository.stats())
  print(cliOf(command), found, () => {
    const sums = [
      ['backups', String(found.backups)],
      ['disks in them', formatSize(found.logicalBytes)],
      ['data in them, shared data once', formatSize(found.plainBytes)],
      ['stored', formatSize(found.storedBytes)],
      ['  needed by one backup', formatSize(found.neededBytes - found.sharedBytes)],
      ['  needed by several', formatSize(found.sharedBytes)],
      ['  needed by none', formatSize(found.unusedBytes)],
      ['packs', String(found.packs)],
      ['chunks and nodes', String(found.blobs)],
    ]
    const each = found.each.map(({ id, logicalBytes, ownBytes }) => [
      id,
      formatSize(logicalBytes),
      formatSize(ownBytes),
    ])
    return [
      ...sums.map(([what = '', value = '']) => `${what.padEnd(32)}${value}`),
      '',
      table(['BACKUP', 'SIZE', 'ALONE'], each),
    ].join('\n')
  })
}

interface CheckFlags extends RepositoryFlags {
  readonly readData?: boolean
  readonly sample?: number
  readonly resume?: string
  readonly repair?: boolean
}

async function check(folder: string, flags: CheckFlags, command: Command): Promise<void> {
  const { readData = false, sample = readData ? 1 : 0, resume, repair = false } = flags
  if (resume !== undefined && sample === 0) {
    throw new BlockError(
      'invalid-argument',
      'nothing is read that could be gone on with: say --read-data or --sample too',
    )
  }
  const before = new Set(resume === undefined ? [] : packsIn(resume))
  const progress = new Progress('check')
  const { report, repaired } = await withRepository(folder, flags, async (repository) => {
    const found = await repository.check({
      reads: (pack) => !before.has(pack) && (sample === 1 || Math.random() < sample),
      packDone: (pack) => resume !== undefined && appendFileSync(resume, `${pack}\n`),
      progress: (done, total) => progress.update(done, total),
    })
    if (found.isGood || !repair) return { report: found, repaired: undefined }
    return { report: found, repaired: await repository.repair(found) }
  })
  progress.end()
  // What is whole has been read as a whole: the next check begins anew.
  if (resume !== undefined && report.isGood && sample === 1) rmSync(resume, { force: true })
  const { bad: _bad, ...shown } = report
  print(cliOf(command), { ...shown, ...(repaired === undefined ? {} : { repaired }) }, () =>
    describeCheck(report, repaired),
  )
  if (report.isGood) return
  const hit = report.hit.length === 0 ? 'no backup is hit' : `${report.hit.length} of ${report.backups} backups are hit`
  throw new BlockError('corrupt', `${folder} is damaged: ${report.objects.length} objects, ${hit}`)
}

/** What an earlier check has noted, in a file that is made when there is none. */
function packsIn(file: string): string[] {
  try {
    appendFileSync(file, '')
    return readFileSync(file, 'utf8').split('\n')
  } catch (error) {
    throw toBlockError(error, file)
  }
}

function describeCheck(
  report: CheckReport,
  repaired: { packs: readonly string[]; moved: number; recovered: number; lost: number } | undefined,
): string {
  const read = report.packsRead > 0 ? `, ${report.packsRead} read as a whole (${formatSize(report.bytesRead)})` : ''
  const lines = [`${report.backups} backups, ${report.packs} packs${read}: ${report.isGood ? 'whole' : 'damaged'}`]
  for (const { key, reason } of report.objects) lines.push(`${key}: ${reason}`)
  for (const { id, reason, ranges, damagedBytes } of report.hit) {
    lines.push(`backup ${id}: ${reason ?? `${damagedBytes} bytes cannot be restored`}`)
    for (const { disk, offset, length } of ranges) lines.push(`  ${disk}: ${length} bytes at ${offset}`)
  }
  if (repaired !== undefined) {
    const { packs, moved, recovered, lost } = repaired
    lines.push(
      `repaired: ${packs.length} packs rewritten, ${moved} blobs moved, ${recovered} from other copies, ${lost} lost`,
    )
    if (lost > 0) lines.push('what is lost is stored again when a full backup meets the same content')
  }
  return lines.join('\n')
}

async function forget(folder: string, backups: string[], flags: RepositoryFlags, command: Command): Promise<void> {
  await withRepository(folder, flags, async (repository) => {
    // All or none, as far as that can be known before.
    for (const id of backups) {
      await repository.backup(id).catch((error: unknown) => {
        if (!(error instanceof BlockError) || error.kind === 'not-found') throw error
      })
    }
    for (const id of new Set(backups)) await repository.forget(id)
  })
  print(cliOf(command), { forgotten: backups }, () => backups.map((id) => `forgotten: ${id}`).join('\n'))
}

interface TagFlags extends RepositoryFlags {
  readonly add?: string[]
  readonly remove?: string[]
}

async function tag(folder: string, backup: string, flags: TagFlags, command: Command): Promise<void> {
  const { add = [], remove = [] } = flags
  const tags = await withRepository(folder, flags, async (repository) => {
    await repository.tag(backup, { add, remove })
    return (await repository.list()).tags.get(backup) ?? []
  })
  print(cliOf(command), { backup, tags }, () => `${backup}: ${tags.length === 0 ? 'no tags' : tags.join(' ')}`)
}

interface PruneFlags extends RepositoryFlags {
  readonly keepLast?: number
  readonly keepHourly?: number
  readonly keepDaily?: number
  readonly keepWeekly?: number
  readonly keepMonthly?: number
  readonly keepYearly?: number
  readonly keepTag?: string[]
  readonly repackBelow: number
  readonly staleAfter?: number
  readonly dryRun?: boolean
}

async function prune(folder: string, flags: PruneFlags, command: Command): Promise<void> {
  const policy = policyOf(flags)
  const progress = new Progress('prune', (steps) => `${steps} steps`)
  const report = await withRepository(folder, flags, (repository) =>
    repository.prune({
      progress: (done, total) => progress.update(done, total),
      ...(policy === undefined ? {} : { keep: policy }),
      ...(flags.staleAfter === undefined ? {} : { leaseMs: flags.staleAfter * 60_000 }),
      repackBelow: flags.repackBelow,
      dryRun: flags.dryRun === true,
    }),
  )
  progress.end()
  print(cliOf(command), report, describePrune)
}

/** Undefined when nothing is said of what to keep: then nothing is forgotten. */
function policyOf(flags: PruneFlags): Retention | undefined {
  const policy: Retention = {
    last: flags.keepLast ?? 0,
    hourly: flags.keepHourly ?? 0,
    daily: flags.keepDaily ?? 0,
    weekly: flags.keepWeekly ?? 0,
    monthly: flags.keepMonthly ?? 0,
    yearly: flags.keepYearly ?? 0,
    tags: flags.keepTag ?? [],
  }
  const isSaid = Object.keys(flags).some((name) => name.startsWith('keep'))
  return isSaid ? policy : undefined
}

function describePrune(report: PruneReport): string {
  const would = report.dryRun ? 'would be ' : ''
  const lines = [
    ...report.kept.map(({ id, reasons }) => `keep    ${id}  ${reasons.join(', ')}`),
    ...report.forgotten.map((id) => `forget  ${id}`),
    `${report.removedPacks} packs ${would}removed (${formatSize(report.removedBytes)}), ${report.repackedPacks} ${would}rewritten (${formatSize(report.repackedBytes)} of them needed)`,
  ]
  if (report.waitingPacks > 0) {
    lines.push(
      `${report.waitingPacks} packs (${formatSize(report.waitingBytes)}) go with the next prune, when these have ended:`,
    )
    for (const who of report.waitingFor) lines.push(`  ${who}`)
  }
  for (const id of report.fenced) lines.push(`given up: ${id} was silent for too long`)
  for (const pack of report.damaged) lines.push(`not rewritten, because it is damaged: packs/${pack}`)
  return lines.join('\n')
}

interface CopyFlags extends RepositoryFlags {
  readonly targetPassphraseFile?: string
  readonly targetKeyFile?: string
}

async function copy(
  source: string,
  target: string,
  backups: string[],
  flags: CopyFlags,
  command: Command,
): Promise<void> {
  const progress = new Progress('copy', (backups) => `${backups} backups`)
  const copied = await withRepository(source, flags, async (from) => {
    const keys = { passphraseFile: flags.targetPassphraseFile, keyFile: flags.targetKeyFile }
    const isOther = keys.passphraseFile !== undefined || keys.keyFile !== undefined
    const into = await openRepositoryAt(target, isOther ? keys : flags)
    try {
      return await from.copyTo(into, {
        ...(backups.length === 0 ? {} : { backups }),
        progress: (done, total) => progress.update(done, total),
      })
    } finally {
      await into.close()
    }
  })
  progress.end()
  print(cliOf(command), copied, () =>
    copied
      .map(({ from, to, storedBytes }) =>
        to === undefined ? `${from}: there already` : `${from} -> ${to}, stored ${formatSize(storedBytes)}`,
      )
      .join('\n'),
  )
}

async function listKeys(folder: string, flags: RepositoryFlags, command: Command): Promise<void> {
  const keys = await withRepository(folder, flags, (repository) => repository.keys())
  print(cliOf(command), keys, () =>
    table(
      ['KEY', 'KIND', 'CREATED', 'LABEL'],
      keys.map(({ name, kind, createdMs, label }) => [name, kind, new Date(createdMs).toISOString(), label]),
    ),
  )
}

interface AddKeyFlags extends RepositoryFlags {
  readonly newPassphraseFile?: string
  readonly newKeyFile?: string
  readonly label: string
}

async function addKey(folder: string, flags: AddKeyFlags, command: Command): Promise<void> {
  const credential = await readCredential({ passphraseFile: flags.newPassphraseFile, keyFile: flags.newKeyFile })
  if (credential === undefined) {
    throw new BlockError(
      'invalid-argument',
      'say what is to open it: --new-passphrase-file FILE or --new-key-file FILE',
    )
  }
  const name = await withRepository(folder, flags, (repository) => repository.addKey(credential, flags.label))
  print(cliOf(command), { key: name }, () => `key ${name}`)
}

async function removeKey(folder: string, key: string, flags: RepositoryFlags, command: Command): Promise<void> {
  await withRepository(folder, flags, (repository) => repository.removeKey(key))
  print(cliOf(command), { removed: key }, () => `removed: ${key}`)
}

function newKeyFile(file: string, _options: unknown, command: Command): void {
  try {
    writeFileSync(file, `${randomBytes(32).toString('hex')}\n`, { flag: 'wx', mode: 0o600 })
  } catch (error) {
    const isThere = (error as NodeJS.ErrnoException).code === 'EEXIST'
    throw new BlockError(
      isThere ? 'exists' : 'io',
      `${file}: ${isThere ? 'it is there already' : (error as Error).message}`,
    )
  }
  print(cliOf(command), { file }, () => file)
}

/** A percentage as a part of one. Kind 'invalid-argument' when it is none. */
function percentOf(text: string): number {
  const percent = /^\d{1,3}(\.\d+)?%?$/.test(text) ? Number.parseFloat(text) : Number.NaN
  if (percent >= 0 && percent <= 100) return percent / 100
  throw new BlockError('invalid-argument', `${JSON.stringify(text)} is not a percentage: write a number from 0 to 100`)
}

function countOf(text: string): number {
  if (/^\d{1,9}$/.test(text)) return Number(text)
  throw new BlockError('invalid-argument', `${JSON.stringify(text)} is not a number: write digits`)
}
