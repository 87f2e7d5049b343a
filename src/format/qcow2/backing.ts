// The reference to a backing file in a qcow2 header: its name in the first cluster, its format in an extension. Opening what it
// names is the chain's affair.

import { utf8 } from '../../base/bytes.ts'
import { BlockError } from '../../block/error.ts'
import type { HostFile } from '../../host/host.ts'
import { encodeHeader, type Header, placeBackingName } from './header.ts'
import * as spec from './spec.ts'

/** The header with another backing reference, its name placed beside the old one; kind 'invalid-argument' when it does not fit. */
export function withBacking(header: Header, name: string, format: string, imagePath: string): Header {
  const length = utf8.encode(name).length
  const isPossible = length > 0 && length <= spec.MAX_BACKING_NAME && !name.includes('\0')
  const changed: Header = { ...header, backing: { name, format } }
  const extensionsEnd = Math.max(encodeHeader(header).length, encodeHeader(changed).length)
  const offset = isPossible ? placeBackingName(header, extensionsEnd, length) : -1
  if (offset < 0) {
    const message = `${imagePath}: the backing file name ${JSON.stringify(name)} does not fit the header; use a shorter one`
    throw new BlockError('invalid-argument', message, { path: imagePath })
  }
  return { ...changed, backingNameOffset: offset }
}

/** Names another backing file in the header of the image in `file`, durably. Kind as for `withBacking`. */
export async function rewriteBacking(file: HostFile, header: Header, name: string, format: string): Promise<void> {
  const changed = withBacking(header, name, format, file.path)
  // First the name, beside the old one, then the fields that lead to it: a crash leaves one or the other.
  const nameBytes = utf8.encode(name)
  await file.write(changed.backingNameOffset, nameBytes.length, nameBytes, 0)
  await file.sync()
  const bytes = encodeHeader(changed)
  await file.write(0, bytes.length, bytes, 0)
  await file.sync()
  header.backing = changed.backing
  header.backingNameOffset = changed.backingNameOffset
}

/** Makes the header name no backing file, durably. */
export async function removeBacking(file: HostFile, header: Header): Promise<void> {
  // The two fields are neighbours in one sector. The format may stay behind: without a file it means nothing.
  const fields = new Uint8Array(spec.HEADER.cluster_bits - spec.HEADER.backing_file_offset)
  await file.write(spec.HEADER.backing_file_offset, fields.length, fields, 0)
  await file.sync()
  header.backing = undefined
  header.backingNameOffset = 0
}
