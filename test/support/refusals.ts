// What a tool for images must do with bad input: one line, the right exit status, and every file as it was.

import assert from 'node:assert/strict'
import { createHash } from 'node:crypto'
import fs from 'node:fs'
import { beginCommand, checkRefusal, type Site } from './site.ts'

export interface Refusal {
  /** After `varve image`. Names in the site's folder begin with @. */
  readonly args: string
  readonly status: number
  readonly says: RegExp
}

/** Runs the command, as another user where that is given, and checks all of it. */
export async function isRefused(site: Site, refusal: Refusal, options: { readonly user?: number } = {}): Promise<void> {
  const { args, status, says } = refusal
  const words = args.split(' ').map((word) => (word === "''" ? '' : word.replace(/^@/, `${site.folder}/`)))
  const before = filesOf(site)
  const outcome = await beginCommand(['image', ...words], options).ended
  checkRefusal(words, outcome, status, says)
  assert.deepEqual(filesOf(site), before, args)
}

/** Every file in the site's folder, with its content's digest. */
function filesOf(site: Site): Record<string, string> {
  const names = fs.readdirSync(site.folder, { recursive: true, encoding: 'utf8' })
  const plain = names.filter((name) => fs.statSync(site.path(name)).isFile())
  const digest = (name: string): string =>
    createHash('sha256')
      .update(fs.readFileSync(site.path(name)))
      .digest('hex')
  return Object.fromEntries(plain.sort().map((name) => [name, digest(name)]))
}
