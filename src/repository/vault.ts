// What makes the bytes of a repository its own: ids of content, proofs over objects, and the lock on what is stored. A plain
// repository has SHA-256 for both and no lock; an encrypted one has keyed forms of them, so that who has only the store
// can neither read a blob, nor tell whether a known file is in it, nor make up an object.
//
//   locked blob     nonce 12 | AES-256-GCM of the compressed bytes | tag 16       bound to the blob's id
//
// Keys come from one secret of the repository (key-box.ts), by HKDF.

import crypto from 'node:crypto'
import { LOCK_BYTES, NONCE_BYTES, TAG_BYTES } from './spec.ts'

const CIPHER = 'aes-256-gcm'
const KEY_BYTES = 32

export class Vault {
  readonly isEncrypted: boolean
  /** The repository's secret, 32 bytes; threads that hash make a vault of their own of it. */
  readonly secret: Uint8Array | undefined
  readonly #ids: Uint8Array | undefined
  readonly #proofs: Uint8Array | undefined
  readonly #blobs: Uint8Array | undefined
  readonly #texts: Uint8Array | undefined

  /** Without a secret, that of a plain repository. */
  constructor(secret?: Uint8Array) {
    this.secret = secret
    this.isEncrypted = secret !== undefined
    const key = (use: string): Uint8Array | undefined =>
      secret && Buffer.from(crypto.hkdfSync('sha256', secret, '', `varve repository 2 ${use}`, KEY_BYTES))
    this.#ids = key('ids')
    this.#proofs = key('proofs')
    this.#blobs = key('blobs')
    this.#texts = key('texts')
  }

  /** The id of plain bytes, 32 bytes. */
  idOf(bytes: Uint8Array): Uint8Array {
    return digest(this.#ids, bytes)
  }

  /** What an object ends with, 32 bytes, to tell when a bit of it is wrong. */
  proofOf(bytes: Uint8Array): Uint8Array {
    return digest(this.#proofs, bytes)
  }

  /** The form in which the bytes of a blob are stored. */
  lock(bytes: Uint8Array, id: Uint8Array): Uint8Array {
    return this.#blobs === undefined ? bytes : encrypt(this.#blobs, bytes, id)
  }

  /** The bytes of a blob again, or undefined when its form is not one that `lock` made for this id. */
  unlock(form: Uint8Array, id: Uint8Array): Uint8Array | undefined {
    return this.#blobs === undefined ? form : decrypt(this.#blobs, form, id)
  }

  /** The same for small texts, bound to the key of their object. Only with encryption. */
  lockText(bytes: Uint8Array, object: string): Uint8Array {
    return encrypt(this.#texts as Uint8Array, bytes, Buffer.from(object))
  }

  unlockText(form: Uint8Array, object: string): Uint8Array | undefined {
    return decrypt(this.#texts as Uint8Array, form, Buffer.from(object))
  }
}

/** That of repositories without encryption. */
export const PLAIN_VAULT = new Vault()

function digest(key: Uint8Array | undefined, bytes: Uint8Array): Uint8Array {
  if (key === undefined) return crypto.hash('sha256', bytes, 'buffer')
  return crypto.createHmac('sha256', key).update(bytes).digest()
}

/** Nonce, encrypted bytes and tag; `bound` must be given again to open it. */
export function encrypt(key: Uint8Array, bytes: Uint8Array, bound: Uint8Array): Uint8Array {
  const nonce = crypto.randomBytes(NONCE_BYTES)
  const cipher = crypto.createCipheriv(CIPHER, key, nonce).setAAD(bound)
  return Buffer.concat([nonce, cipher.update(bytes), cipher.final(), cipher.getAuthTag()])
}

/** Undefined when a bit of it, the key or what it is bound to is another. */
export function decrypt(key: Uint8Array, form: Uint8Array, bound: Uint8Array): Uint8Array | undefined {
  if (form.length < LOCK_BYTES) return undefined
  const end = form.length - TAG_BYTES
  const decipher = crypto.createDecipheriv(CIPHER, key, form.subarray(0, NONCE_BYTES), { authTagLength: TAG_BYTES })
  decipher.setAAD(bound).setAuthTag(form.subarray(end))
  try {
    return Buffer.concat([decipher.update(form.subarray(NONCE_BYTES, end)), decipher.final()])
  } catch {
    return undefined
  }
}
