// What an NBD server serves: an Export is a device under a name. Server, handshake and transmission know no more of the
// rest of Varve than this.

import type { BlockDevice, Pending } from '../block/device.ts'
import {
  NBD_FLAG_CAN_MULTI_CONN,
  NBD_FLAG_HAS_FLAGS,
  NBD_FLAG_READ_ONLY,
  NBD_FLAG_SEND_CACHE,
  NBD_FLAG_SEND_DF,
  NBD_FLAG_SEND_FAST_ZERO,
  NBD_FLAG_SEND_FLUSH,
  NBD_FLAG_SEND_FUA,
  NBD_FLAG_SEND_TRIM,
  NBD_FLAG_SEND_WRITE_ZEROES,
} from './spec.ts'

/** Sees one piece of a range with its 32-bit status; returns false to stop. */
export type StatusVisitor = (length: number, status: number) => boolean

/** A question that block status requests can ask of a range, such as "qemu:dirty-bitmap:daily". */
export interface MetaContext {
  /** A namespace, a colon and a name; at most 4096 bytes. */
  readonly name: string
  /** Visits the range in pieces, in order, each with its status; offsets and lengths in bytes. */
  extents(offset: number, length: number, visit: StatusVisitor): Pending
}

export interface Export {
  /** What clients ask for; at most 4096 bytes. */
  readonly name: string
  /** For people who list the exports. */
  readonly description?: string
  readonly device: BlockDevice
  /** Refuses every change, whatever the device can. */
  readonly readOnly?: boolean
  /** Tells clients that a flush on one connection covers writes on all; true unless told. */
  readonly multiConn?: boolean
  /** Contexts besides base:allocation, which comes from the device's extents. */
  readonly contexts?: readonly MetaContext[]
  /** Called when a client enters transmission, and when that connection is over. */
  readonly opened?: () => void
  readonly closed?: () => void
}

/** A metadata context that a client selected, with the number it has on this connection. */
export interface SelectedContext {
  readonly id: number
  readonly context: MetaContext
}

/** What client and server agreed on in the handshake. */
export interface Session {
  readonly export: Export
  readonly structured: boolean
  readonly contexts: readonly SelectedContext[]
}

export function isReadOnly(served: Export): boolean {
  return served.readOnly === true || !served.device.can.write
}

/** The transmission flags of an export ("Transmission flags"). */
export function transmissionFlags(served: Export, structured: boolean): number {
  const { can } = served.device
  let flags = NBD_FLAG_HAS_FLAGS | NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_FUA | NBD_FLAG_SEND_CACHE
  if (structured) flags |= NBD_FLAG_SEND_DF
  if (served.multiConn !== false) flags |= NBD_FLAG_CAN_MULTI_CONN
  if (isReadOnly(served)) return flags | NBD_FLAG_READ_ONLY
  if (can.trim !== 'none') flags |= NBD_FLAG_SEND_TRIM
  if (can.zero !== 'none') flags |= NBD_FLAG_SEND_WRITE_ZEROES | NBD_FLAG_SEND_FAST_ZERO
  return flags
}
