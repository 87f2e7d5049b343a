// Sealed texts: one line of JSON and one line with its digest. Small objects that people may want to read, and that must
// tell when a bit of them is wrong.

import crypto from 'node:crypto'
import { utf8 } from '../base/bytes.ts'
import { SEALED_BYTES_MAX } from '../base/limits.ts'
import { BlockError } from '../block/error.ts'

const SEAL = /^(.*\n)sha256 ([0-9a-f]{64})\n$/s

export function seal(value: object): Uint8Array {
  const text = `${JSON.stringify(value)}\n`
  return utf8.encode(`${text}sha256 ${digest(text)}\n`)
}

/** The value in a sealed text. Kind 'corrupt' when it is not as it was sealed; `where` names it. */
export function unseal(bytes: Uint8Array, where: string): unknown {
  const text = bytes.length <= SEALED_BYTES_MAX ? utf8.decode(bytes) : ''
  const [, body, expected] = SEAL.exec(text) ?? []
  // Bytes that are no UTF-8 would be replaced while decoding, so the digest of the text covers them too.
  if (body === undefined || digest(body) !== expected) {
    throw new BlockError('corrupt', `${where} is damaged: it does not have the digest that it was sealed with`, {
      path: where,
    })
  }
  try {
    return JSON.parse(body) as unknown
  } catch (error) {
    throw new BlockError('corrupt', `${where} is sealed but is no JSON`, { path: where }, error)
  }
}

function digest(text: string): string {
  return crypto.hash('sha256', text, 'hex')
}
