// What every command shares: the global options, and how results and errors are shown, results on standard output,
// errors on standard error. It knows no daemon: commands without one start in a fraction of the time.

import { Option } from 'commander'
import { QCOW2_METADATA_BYTES, QCOW2_METADATA_MIN } from '../base/limits.ts'
import { formatSize, parseSize } from '../base/size.ts'
import { BlockError, type ErrorKind, isBlockError } from '../block/error.ts'
import { DURABILITIES } from '../dirtylog/durability.ts'
import { CACHE_MODES } from '../host/cache-mode.ts'

/** Exit statuses: 0 done, 1 failed, 2 usage, 3 not found, 4 busy or locked, 5 corrupt or verification failed. */
export const EXIT_STATUS: Record<ErrorKind, number> = {
  io: 1,
  'no-space': 1,
  'out-of-range': 2,
  'read-only': 1,
  unsupported: 1,
  'invalid-format': 5,
  corrupt: 5,
  'invalid-argument': 2,
  'not-found': 3,
  exists: 4,
  busy: 4,
  closed: 1,
  cancelled: 1,
  timeout: 1,
  permission: 1,
  protocol: 1,
}

export interface GlobalOptions {
  readonly json?: boolean
  readonly home?: string
}

/** Prints a result: as JSON for programs, else as `text` makes it. */
export function print<T>(cli: { readonly json: boolean }, result: T, text: (result: T) => string): void {
  process.stdout.write(cli.json ? `${JSON.stringify(result, undefined, 2)}\n` : `${text(result)}\n`)
}

/** Rows as aligned columns under their heads. */
export function table(heads: readonly string[], rows: readonly (readonly string[])[]): string {
  const widths = heads.map((head, column) => Math.max(head.length, ...rows.map((row) => (row[column] ?? '').length)))
  return [heads, ...rows]
    .map((row) =>
      row
        .map((cell, i) => cell.padEnd(widths[i] as number))
        .join('  ')
        .trimEnd(),
    )
    .join('\n')
}

/** A size argument in bytes. Kind 'invalid-argument' when it is none. */
export function sizeArgument(text: string): number {
  const bytes = parseSize(text)
  if (bytes !== undefined) return bytes
  throw new BlockError('invalid-argument', `${JSON.stringify(text)} is not a size: write 512M, 4G or a number of bytes`)
}

/** The size of the metadata cache in bytes. Kind 'invalid-argument' when it is no size, or too small. */
function metadataCacheArgument(text: string): number {
  const bytes = sizeArgument(text)
  if (bytes >= QCOW2_METADATA_MIN) return bytes
  const message = `a metadata cache of ${text} is too small: give it ${formatSize(QCOW2_METADATA_MIN)} or more`
  throw new BlockError('invalid-argument', message)
}

/** The option for it, with the meaning that all commands that serve share. */
export function metadataCacheOption(): Option {
  const what = `memory for the maps of all open qcow2 images (default: ${formatSize(QCOW2_METADATA_BYTES)})`
  return new Option('--metadata-cache <size>', what).argParser(metadataCacheArgument)
}

/** `--cache MODE`; writeback unless told. */
export function cacheOption(): Option {
  const what = 'writeback; none: past the page cache; unsafe: flushes do nothing'
  return new Option('--cache <mode>', what).choices(CACHE_MODES).default('writeback')
}

/** `--durability D`: what a bitmap outlives. */
export function durabilityOption(about: string): Option {
  return new Option('--durability <what>', `${about}: host, process, none`).choices(DURABILITIES)
}

/** A TCP port argument. Kind 'invalid-argument' when it is none. */
export function portArgument(text: string): number {
  const port = /^\d{1,5}$/.test(text) ? Number(text) : -1
  if (port >= 0 && port <= 65_535) return port
  throw new BlockError('invalid-argument', `${JSON.stringify(text)} is not a port: write a number from 0 to 65535`)
}

/** One line on standard error, about what goes on all the same. */
export function warn(message: string): void {
  process.stderr.write(`varve: ${message}\n`)
}

/** One line on standard error, and the exit status that the error's kind has. */
export function reportError(error: unknown, json: boolean): number {
  if (isBlockError(error)) {
    const { kind, message } = error
    process.stderr.write(json ? `${JSON.stringify({ error: { kind, message } })}\n` : `varve: ${message}\n`)
    return EXIT_STATUS[kind]
  }
  process.stderr.write(`varve: ${error instanceof Error ? (error.stack ?? error.message) : String(error)}\n`)
  return 1
}

/** An option's time. Kind 'invalid-argument' for none. */
export function seconds(text: string): number {
  const value = Number(text)
  if (text.trim() !== '' && Number.isFinite(value) && value > 0) return value
  throw new BlockError('invalid-argument', `${JSON.stringify(text)} is no time: seconds, more than 0`)
}
