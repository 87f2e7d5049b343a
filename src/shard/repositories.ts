// Opens repositories by what a user calls them: a folder; and what opens an encrypted one: a file with its passphrase or its key, named
// by the caller or by the environment of the process, so that the daemon can be told too.

import path from 'node:path'
import { CREDENTIAL_FILE_BYTES_MAX } from '../base/limits.ts'
import { BlockError } from '../block/error.ts'
import { cacheFolder } from '../engine/home.ts'
import { realHost } from '../host/real.ts'
import {
  type Credential,
  initRepository,
  openRepository,
  type Repository,
  type RepositoryOptions,
} from '../repository/repository.ts'
import { CONFIG_KEY } from '../repository/spec.ts'
import { DirectoryStore } from '../repository/stores/directory.ts'
import { TableFolder } from '../repository/table-folder.ts'

/** Paths of files. At most one is given. */
export interface CredentialFiles {
  readonly passphraseFile?: string | undefined
  readonly keyFile?: string | undefined
}

/** Variables of the environment, for what is not said otherwise. */
const PASSPHRASE_VARIABLE = 'VARVE_PASSPHRASE_FILE'
const KEY_VARIABLE = 'VARVE_KEY_FILE'
const APPEND_VARIABLE = 'VARVE_APPEND_ONLY'

/** Kind 'not-found' when there is no repository, with the command that makes one. */
export async function openRepositoryAt(location: string, files?: CredentialFiles): Promise<Repository> {
  return openRepository(storeAt(location), await optionsOf(files))
}

/** Makes a repository in a folder that is empty or not there yet. Kind 'exists' for any other. */
export async function initRepositoryAt(location: string, files?: CredentialFiles): Promise<Repository> {
  const store = storeAt(location)
  const options = await optionsOf(files)
  const status = await realHost.status(store.name)
  if (status !== undefined && status.kind !== 'folder') {
    throw new BlockError('exists', `${store.name} is no folder: a repository is made in one`, { path: store.name })
  }
  const found = await realHost.list(store.name)
  // A repository's own refusal is the better one; a .part file or keys were left by a crash in the middle of making one.
  const isForeign =
    !found.includes(CONFIG_KEY) && found.some((name) => name !== `${CONFIG_KEY}.part` && name !== 'keys')
  if (!isForeign) return initRepository(store, options)
  const message = `${store.name} is not empty: a repository is made in a new or an empty folder`
  throw new BlockError('exists', message, { path: store.name })
}

/** What a user calls a repository, for another process to find: its folder's absolute path. Kind 'unsupported' for URLs. */
export function absoluteLocation(location: string): string {
  const scheme = /^([a-z][a-z0-9+.-]*):/i.exec(location)?.[1]
  if (scheme === undefined) return path.resolve(location)
  throw new BlockError('unsupported', `repository ${location}: ${scheme}: is not supported; a folder is`)
}

/** What the file holds. Kind 'invalid-argument' when it is no passphrase or key. */
export async function readCredential({ passphraseFile, keyFile }: CredentialFiles): Promise<Credential | undefined> {
  if (passphraseFile !== undefined && keyFile !== undefined) {
    throw new BlockError('invalid-argument', 'a passphrase and a key file were given: one of them opens a repository')
  }
  if (passphraseFile !== undefined) {
    const passphrase = (await readSmall(passphraseFile)).toString('utf8').replace(/\r?\n$/, '')
    if (passphrase === '' || passphrase.includes('\n')) {
      throw new BlockError(
        'invalid-argument',
        `${passphraseFile} is no passphrase: it has one line, which is not empty`,
      )
    }
    return { kind: 'passphrase', passphrase }
  }
  if (keyFile === undefined) return undefined
  const text = (await readSmall(keyFile)).toString('latin1').trim()
  if (/^[0-9a-f]{64}$/.test(text)) return { kind: 'file', key: Buffer.from(text, 'hex') }
  throw new BlockError(
    'invalid-argument',
    `${keyFile} is no key: it has 64 hexadecimal digits, as \`varve repo key new FILE\` makes them`,
  )
}

async function optionsOf(files: CredentialFiles = {}): Promise<RepositoryOptions> {
  const isSaid = files.passphraseFile !== undefined || files.keyFile !== undefined
  const { [PASSPHRASE_VARIABLE]: passphraseFile, [KEY_VARIABLE]: keyFile, [APPEND_VARIABLE]: append } = process.env
  const credential = await readCredential(isSaid ? files : { passphraseFile, keyFile })
  return {
    ...(credential === undefined ? {} : { credential }),
    appendOnly: append !== undefined && append !== '',
    tables: (id) => ({ folder: new TableFolder(realHost, path.join(cacheFolder(), 'tables', id)) }),
  }
}

async function readSmall(name: string): Promise<Buffer> {
  const file = await realHost.open(path.resolve(name), { background: true })
  try {
    if (file.size() > CREDENTIAL_FILE_BYTES_MAX) {
      throw new BlockError('invalid-argument', `${name} is too large for a passphrase or key`, { path: name })
    }
    const bytes = Buffer.alloc(file.size())
    await file.read(0, bytes.length, bytes, 0)
    return bytes
  } finally {
    await file.close()
  }
}

function storeAt(location: string): DirectoryStore {
  return new DirectoryStore(realHost, absoluteLocation(location))
}
