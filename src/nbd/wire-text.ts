// Strings on the wire ("Conventions"): UTF-8 without NUL, at most NBD_MAX_STRING bytes. What we say is made to fit, what others
// say is looked at.

import { utf8 } from '../base/bytes.ts'
import { NBD_MAX_STRING } from './spec.ts'

const strict = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true })

/** A text for people as bytes of a string: what is too long is cut between two characters, NULs are replaced. */
export function wireText(text: string): Uint8Array {
  const bytes = utf8.encode(text.includes('\0') ? text.replaceAll('\0', '\u{fffd}') : text)
  if (bytes.length <= NBD_MAX_STRING) return bytes
  let end = NBD_MAX_STRING
  while (((bytes[end] as number) & 0xc0) === 0x80) end--
  return bytes.subarray(0, end)
}

/** The text of a string, or undefined where the bytes are none. */
export function textOf(bytes: Uint8Array): string | undefined {
  if (bytes.length > NBD_MAX_STRING || bytes.includes(0)) return undefined
  try {
    return strict.decode(bytes)
  } catch {
    return undefined
  }
}
