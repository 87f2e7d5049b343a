// The options that the commands of `varve image` share, named as qemu-img names them.

import { type Command, Option } from 'commander'
import { FORMATS, type Format } from '../../chain/open.ts'
import { type GlobalOptions, warn } from '../context.ts'
import { Progress } from '../progress.ts'

export interface ImageOptions {
  readonly format?: Format
  readonly allow?: readonly string[]
  readonly forceShare?: boolean
}

/** What `openImage` takes of them. */
export interface WhatToOpen {
  readonly format: Format | undefined
  readonly allowedFolders: readonly string[]
  readonly forceShare: boolean
  readonly report: (message: string) => void
}

export const formatOption = (): Option =>
  new Option('-f, --format <format>', 'format of the image; without it the first bytes are looked at').choices(FORMATS)

export const allowOption = (): Option =>
  new Option('--allow <folder>', 'backing files may be in this folder too (repeatable)').argParser(
    (folder: string, before: readonly string[] | undefined) => [...(before ?? []), folder],
  )

export const shareOption = (): Option =>
  new Option('-U, --force-share', 'read the image even while another process writes to it')

export const outputOption = (): Option =>
  new Option('--output <form>', 'human or json, as --json').choices(['human', 'json'])

export const quietOption = (): Option => new Option('-q, --quiet', 'print nothing but errors')

export const progressOption = (): Option => new Option('-p, --progress', 'show progress on standard error')

export const createOption = (): Option =>
  new Option('-o, --options <list>', 'of the new image: name=value,name=value, as qemu-img has them').argParser(
    (text: string, before: readonly string[] | undefined) => [...(before ?? []), text],
  )

export function whatToOpen({ format, allow = [], forceShare = false }: ImageOptions): WhatToOpen {
  return { format, allowedFolders: allow, forceShare, report: warn }
}

/** True for --json and --output=json. */
export function wantsJson(command: Command): boolean {
  const { json, output } = command.optsWithGlobals<GlobalOptions & { output?: string }>()
  return output === undefined ? json === true : output === 'json'
}

/** Prints a result: as JSON for programs, else as `text` makes it. */
export function printResult<T>(command: Command, result: T, text: (result: T) => string): void {
  const shown = wantsJson(command) ? JSON.stringify(result, undefined, 4) : text(result)
  if (shown !== '') process.stdout.write(`${shown}\n`)
}

type ReportProgress = (done: number, total: number) => void

/** Runs `work`, with a bar on standard error when `isShown`. */
export async function withProgress<T>(
  title: string,
  isShown: boolean | undefined,
  work: (progress: ReportProgress) => Promise<T>,
): Promise<T> {
  if (isShown !== true) return work(() => undefined)
  const bar = new Progress(title)
  try {
    return await work((done, total) => bar.update(done, total))
  } finally {
    bar.end()
  }
}
