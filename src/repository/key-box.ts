// The secret of an encrypted repository, behind passphrases and key files. Each of them is an object in `keys/` that holds the
// secret locked; so a passphrase is changed by adding one and removing the other, and no data is written anew.
//
//   passphrase --argon2id, salt--> 32 bytes --.
//   key file, 32 bytes -----------------------+--HKDF--> locks the secret, bound to the repository's id

import crypto from 'node:crypto'
import { promisify } from 'node:util'
import { ARGON_LANES, ARGON_MEMORY_KIB, ARGON_MEMORY_MAX_KIB, ARGON_PASSES } from '../base/limits.ts'
import { BlockError, isBlockError } from '../block/error.ts'
import { seal, unseal } from './sealed.ts'
import { type Check, fitted, isCount, isObject, isOneOf, isText, matches, type Shape } from './shape.ts'
import { FORMAT_VERSION, KEYS } from './spec.ts'
import type { ObjectStore } from './store.ts'
import { decrypt, encrypt } from './vault.ts'

/** What opens an encrypted repository. */
export type Credential =
  | { readonly kind: 'passphrase'; readonly passphrase: string }
  /** 32 bytes. */
  | { readonly kind: 'file'; readonly key: Uint8Array }

/** How much work a passphrase costs whoever tries one. */
interface Argon {
  readonly memoryKiB: number
  readonly passes: number
  readonly lanes: number
  readonly salt: string
}

interface KeyRecord {
  readonly format: typeof FORMAT_VERSION
  readonly kind: Credential['kind']
  /** Milliseconds since 1970. */
  readonly createdMs: number
  /** For people. */
  readonly label: string
  readonly argon: Argon | null
  /** The secret, locked, in hexadecimal. */
  readonly locked: string
}

/** What is to be said of a key without opening it. */
export interface KeyInfo extends Pick<KeyRecord, 'kind' | 'createdMs' | 'label'> {
  readonly name: string
}

const between =
  (least: number, most: number): Check =>
  (value) =>
    isCount(value) && (value as number) >= least && (value as number) <= most
const ARGON: Shape<Argon> = {
  memoryKiB: between(8, ARGON_MEMORY_MAX_KIB),
  passes: between(1, 64),
  lanes: between(1, 64),
  salt: matches(/^[0-9a-f]{32}$/),
}
const KEY: Shape<KeyRecord> = {
  format: isOneOf(FORMAT_VERSION),
  kind: isOneOf('passphrase', 'file'),
  createdMs: isCount,
  label: isText,
  argon: (value) =>
    value === null || (isObject(value) && Object.entries(ARGON).every(([field, check]) => check(value[field]))),
  locked: matches(/^[0-9a-f]{120}$/),
}

const SECRET_BYTES = 32
const argon2 = promisify(crypto.argon2)

export function newSecret(): Uint8Array {
  return crypto.randomBytes(SECRET_BYTES)
}

/** Puts the secret behind a credential; returns the key's name. `repository` is its id. */
export async function addKey(
  store: ObjectStore,
  repository: string,
  secret: Uint8Array,
  { credential, label, nowMs }: { readonly credential: Credential; readonly label: string; readonly nowMs: number },
): Promise<string> {
  const argon: Argon | null =
    credential.kind === 'file'
      ? null
      : {
          memoryKiB: ARGON_MEMORY_KIB,
          passes: ARGON_PASSES,
          lanes: ARGON_LANES,
          salt: crypto.randomBytes(16).toString('hex'),
        }
  const locked = encrypt(await lockingKey(credential, argon), secret, Buffer.from(repository))
  const name = crypto.randomBytes(8).toString('hex')
  const record: KeyRecord = {
    format: FORMAT_VERSION,
    kind: credential.kind,
    createdMs: nowMs,
    label,
    argon,
    locked: Buffer.from(locked).toString('hex'),
  }
  await store.put(KEYS + name, [seal(record)])
  return name
}

/** The secret. Kind 'permission' when the credential opens none of the keys; a damaged key does not hinder another. */
export async function openSecret(store: ObjectStore, repository: string, credential: Credential): Promise<Uint8Array> {
  const damaged: BlockError[] = []
  let tried = 0
  for (const key of await store.list(KEYS)) {
    try {
      const record = unsealKey(await store.get(key), `${store.name}: ${key}`)
      if (record.kind !== credential.kind) continue
      tried++
      const form = Buffer.from(record.locked, 'hex')
      const secret = decrypt(await lockingKey(credential, record.argon), form, Buffer.from(repository))
      if (secret?.length === SECRET_BYTES) return secret
    } catch (error) {
      if (!isBlockError(error, 'corrupt') && !isBlockError(error, 'invalid-format')) throw error
      damaged.push(error)
    }
  }
  const [first] = damaged
  if (first !== undefined) throw first
  const what = credential.kind === 'file' ? 'the key file' : 'the passphrase'
  const message = `${store.name} is encrypted, and ${what} is not one of its ${tried} of that kind`
  throw new BlockError('permission', message)
}

export async function listKeys(store: ObjectStore): Promise<KeyInfo[]> {
  const keys: KeyInfo[] = []
  for (const key of await store.list(KEYS)) {
    const { kind, createdMs, label } = unsealKey(await store.get(key), `${store.name}: ${key}`)
    keys.push({ name: key.slice(KEYS.length), kind, createdMs, label })
  }
  return keys
}

/** Kinds 'not-found', and 'invalid-argument' for the last one: without any the data is lost. */
export async function removeKey(store: ObjectStore, name: string): Promise<void> {
  const keys = await store.list(KEYS)
  if (!keys.includes(KEYS + name)) throw new BlockError('not-found', `${store.name} has no key ${name}`)
  if (keys.length === 1) {
    const message = `${name} is the only key of ${store.name}: without it nothing could be read again; add another first`
    throw new BlockError('invalid-argument', message)
  }
  await store.remove(KEYS + name)
}

/** Kinds 'corrupt' and 'invalid-format'. */
export function unsealKey(bytes: Uint8Array, where: string): KeyRecord {
  return fitted(KEY, unseal(bytes, where), where)
}

async function lockingKey(credential: Credential, argon: Argon | null): Promise<Uint8Array> {
  const strong = credential.kind === 'file' ? credential.key : await stretched(credential.passphrase, argon)
  return Buffer.from(crypto.hkdfSync('sha256', strong, '', 'varve repository 2 key', SECRET_BYTES))
}

/** In a thread of Node's pool: guests of this thread do not wait for it. */
async function stretched(passphrase: string, argon: Argon | null): Promise<Uint8Array> {
  if (argon === null) throw new BlockError('invalid-format', 'a key behind a passphrase does not say how it is derived')
  return argon2('argon2id', {
    message: Buffer.from(passphrase.normalize('NFC'), 'utf8'),
    nonce: Buffer.from(argon.salt, 'hex'),
    memory: argon.memoryKiB,
    passes: argon.passes,
    parallelism: argon.lanes,
    tagLength: SECRET_BYTES,
  })
}
