// Makes a file that takes long to fill: under a name of its own, which becomes the right one when it is whole and durable. So
// the name never leads to half an image, and what was there before stays until then.

import path from 'node:path'
import { BlockError } from '../block/error.ts'
import type { Host, HostFile } from '../host/host.ts'

export interface WholeFileOptions {
  readonly host: Host
  readonly path: string
  /** Replaces a file that is there and that nobody uses. */
  readonly force?: boolean | undefined
}

/**
 * Has `make` fill the file at the path that it is given; what is there is removed when it fails. Kinds: 'exists', 'busy' when
 * the file to be replaced is in use, 'invalid-argument' when it is no file, and what `make` throws.
 */
export async function makeWholeFile<T>(
  options: WholeFileOptions,
  make: (partialPath: string) => Promise<T>,
): Promise<T> {
  const { host, path: target } = options
  const replaced = await claimReplaced(options)
  try {
    const partial = `${target}.partial`
    if ((await host.status(partial)) !== undefined) {
      const message = `${partial} is there: another command is at work, or one was killed; when none is, remove it`
      throw new BlockError('exists', message, { path: partial })
    }
    try {
      const result = await make(partial)
      await host.rename(partial, target)
      await host.syncFolder(path.dirname(target))
      return result
    } catch (error) {
      await host.unlink(partial)
      throw error
    }
  } finally {
    await replaced?.close()
  }
}

/** The file that is to be replaced, claimed so that nobody begins to use it; undefined when there is none. */
async function claimReplaced({ host, path: target, force }: WholeFileOptions): Promise<HostFile | undefined> {
  const status = await host.status(target)
  if (status === undefined) return undefined
  if (force !== true)
    throw new BlockError('exists', `${target} is there already: --force replaces it`, { path: target })
  if (status.kind === 'file') return host.open(target, { write: true, lock: 'write' })
  throw new BlockError('invalid-argument', `${target} is not a file, and only a file can be replaced`, { path: target })
}
