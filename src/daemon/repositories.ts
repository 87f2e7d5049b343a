// Opens repositories by what a user calls them: a folder.

import path from 'node:path'
import { BlockError } from '../block/error.ts'
import { realHost } from '../host/real.ts'
import { initRepository, openRepository, type Repository } from '../repository/repository.ts'
import { DirectoryStore } from '../repository/stores/directory.ts'

/** Kind 'not-found' when there is no repository, with the command that makes one. */
export function openRepositoryAt(location: string): Promise<Repository> {
  return openRepository(storeAt(location))
}

/** Makes a repository in a folder that is empty or not there yet. */
export function initRepositoryAt(location: string): Promise<Repository> {
  return initRepository(storeAt(location))
}

function storeAt(location: string): DirectoryStore {
  const scheme = /^([a-z][a-z0-9+.-]*):/i.exec(location)?.[1]
  if (scheme !== undefined) {
    throw new BlockError('unsupported', `repository ${location}: ${scheme}: is not supported; a folder is`)
  }
  return new DirectoryStore(realHost, path.resolve(location))
}
