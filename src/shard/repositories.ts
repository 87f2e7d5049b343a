// Opens repositories by what a user calls them: a folder.

import path from 'node:path'
import { BlockError } from '../block/error.ts'
import { realHost } from '../host/real.ts'
import { initRepository, openRepository, type Repository } from '../repository/repository.ts'
import { CONFIG_KEY } from '../repository/spec.ts'
import { DirectoryStore } from '../repository/stores/directory.ts'

/** Kind 'not-found' when there is no repository, with the command that makes one. */
export function openRepositoryAt(location: string): Promise<Repository> {
  return openRepository(storeAt(location))
}

/** Makes a repository in a folder that is empty or not there yet. Kind 'exists' for any other. */
export async function initRepositoryAt(location: string): Promise<Repository> {
  const store = storeAt(location)
  const status = await realHost.status(store.name)
  if (status !== undefined && status.kind !== 'folder') {
    throw new BlockError('exists', `${store.name} is no folder: a repository is made in one`, { path: store.name })
  }
  const found = await realHost.list(store.name)
  // A repository's own refusal is the better one; an .part file was left by a crash in the middle of making one.
  const isForeign = !found.includes(CONFIG_KEY) && found.some((name) => name !== `${CONFIG_KEY}.part`)
  if (!isForeign) return initRepository(store)
  const message = `${store.name} is not empty: a repository is made in a new or an empty folder`
  throw new BlockError('exists', message, { path: store.name })
}

/** What a user calls a repository, for another process to find: its folder's absolute path. Kind 'unsupported' for URLs. */
export function absoluteLocation(location: string): string {
  const scheme = /^([a-z][a-z0-9+.-]*):/i.exec(location)?.[1]
  if (scheme === undefined) return path.resolve(location)
  throw new BlockError('unsupported', `repository ${location}: ${scheme}: is not supported; a folder is`)
}

function storeAt(location: string): DirectoryStore {
  return new DirectoryStore(realHost, absoluteLocation(location))
}
