// Sealed texts: one line of JSON and one line with its digest, or, in an encrypted repository, JSON that is locked to the name of
// its object. Small objects that must tell when a bit of them is wrong, and that people may read where they are plain.

import crypto from 'node:crypto'
import { utf8 } from '../base/bytes.ts'
import { SEALED_BYTES_MAX } from '../base/limits.ts'
import { BlockError } from '../block/error.ts'
import { SEAL_MAGIC } from './spec.ts'
import type { Vault } from './vault.ts'

const SEAL = /^(.*\n)sha256 ([0-9a-f]{64})\n$/s

/** A text that everybody can read. */
export function seal(value: object): Uint8Array {
  const text = `${JSON.stringify(value)}\n`
  return utf8.encode(`${text}sha256 ${digest(text)}\n`)
}

/** A text of the object `key`, which only the vault opens when it is an encrypted one's. */
export function sealFor(vault: Vault, key: string, value: object): Uint8Array {
  if (!vault.isEncrypted) return seal(value)
  return Buffer.concat([utf8.encode(SEAL_MAGIC), vault.lockText(utf8.encode(JSON.stringify(value)), key)])
}

/** The value in a sealed text. Kind 'corrupt' when it is not as it was sealed; `where` names it. */
export function unseal(bytes: Uint8Array, where: string): unknown {
  const text = bytes.length <= SEALED_BYTES_MAX ? utf8.decode(bytes) : ''
  const [, body, expected] = SEAL.exec(text) ?? []
  // Bytes that are no UTF-8 would be replaced while decoding, so the digest of the text covers them too.
  if (body === undefined || digest(body) !== expected) throw damaged(where)
  return parse(body, where)
}

/** As unseal, for what sealFor made for the object `key`. */
export function unsealFor(vault: Vault, key: string, bytes: Uint8Array, where: string): unknown {
  if (!vault.isEncrypted) return unseal(bytes, where)
  const start = SEAL_MAGIC.length
  const isSealed = bytes.length <= SEALED_BYTES_MAX && utf8.decode(bytes.subarray(0, start)) === SEAL_MAGIC
  const text = isSealed ? vault.unlockText(bytes.subarray(start), key) : undefined
  if (text === undefined) throw damaged(where)
  return parse(utf8.decode(text), where)
}

function damaged(where: string): BlockError {
  const message = `${where} is damaged: it does not have the digest that it was sealed with`
  return new BlockError('corrupt', message, { path: where })
}

function parse(text: string, where: string): unknown {
  try {
    return JSON.parse(text) as unknown
  } catch (error) {
    throw new BlockError('corrupt', `${where} is sealed but is no JSON`, { path: where }, error)
  }
}

function digest(text: string): string {
  return crypto.hash('sha256', text, 'hex')
}
