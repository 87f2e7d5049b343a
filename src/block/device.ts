// The central interface: everything that holds blocks is a BlockDevice, from a host file to a remote NBD export.
// This file has the contract only; guard.ts checks it at the door, the contract suite in test/contract states it as
// tests. An image file of a chain is a Layer, which also knows what it owns.
//
//   NBD request -> guard -> Disk -> chain -> qcow2 image -> host file

/** Work still in flight; `undefined` when it finished, successfully, within the call. */
export type Pending = Promise<void> | undefined

/** Request flags. */
export const FUA = 1 // the data is on stable storage before the request completes
export const MAY_UNMAP = 2 // `zero` may deallocate

/** Extent bits, those of NBD's base:allocation context: what a range reads as. */
export const HOLE = 1 // nothing is allocated there
export const ZERO = 2 // it reads as zeros

/** How a device does what it is asked: not at all, by other means (correct, slower), or by itself. */
export type Support = 'none' | 'emulated' | 'native'

export interface Capabilities {
  readonly write: boolean
  readonly fua: Support
  readonly zero: Support
  readonly trim: Support
  readonly extents: Support
  /** Smallest unit of offsets and lengths, and the one that works best, in bytes; powers of two. */
  readonly minimumBlock: number
  readonly bestBlock: number
}

/** Sees one piece of a range, in order; returns false to stop. */
export type ExtentVisitor = (length: number, extent: number) => boolean

/**
 * Offsets and lengths are bytes and safe integers. The caller owns the buffer; the device keeps no reference to it after
 * completion. All `length` bytes are done, or the request fails with a BlockError: thrown when it fails within the call,
 * else by rejecting the promise. Requests in flight together have no order. `flush` covers every write completed before
 * it was called. After `close` every request fails with kind 'closed'.
 */
export interface BlockDevice {
  /** For messages: "vm7/top.qcow2". */
  readonly name: string
  /** Bytes. */
  readonly size: number
  readonly can: Capabilities
  read(offset: number, length: number, into: Uint8Array, at: number): Pending
  write(offset: number, length: number, from: Uint8Array, at: number, flags: number): Pending
  /** Makes the range read as zeros; with MAY_UNMAP it may be deallocated. */
  zero(offset: number, length: number, flags: number): Pending
  /** Says that the range is no longer needed: afterwards each block reads as before or as zeros. */
  trim(offset: number, length: number, flags: number): Pending
  flush(): Pending
  /** Visits the whole range in pieces, in order, each with its extent bits. */
  extents(offset: number, length: number, visit: ExtentVisitor): Pending
  close(): Promise<void>
}

/** Who holds a range of a layer. UNALLOCATED shows what is below; the others hide it. */
export const UNALLOCATED = 0
export const OWNED_DATA = 1
export const OWNED_ZERO = 2

export type Ownership = typeof UNALLOCATED | typeof OWNED_DATA | typeof OWNED_ZERO
export type OwnershipVisitor = (length: number, ownership: Ownership) => boolean

/**
 * One image file of a chain. As a BlockDevice it shows its own data, and through it that of `backing` where it owns
 * nothing (zeros where `backing` is undefined or ends before).
 */
export interface Layer extends BlockDevice {
  /** The image's path on the host, for messages and for the catalog. */
  readonly path: string
  readonly format: string
  /** Smallest unit of ownership, in bytes: qcow2's cluster. */
  readonly clusterSize: number
  /** What the image's header says of its backing file, unresolved; undefined for a base. */
  readonly backingReference: BackingReference | undefined
  /** What shows through; set by the chain that opens the layer. A chain closes its layers; a layer never closes this. */
  backing: BlockDevice | undefined
  /** Visits the whole range in pieces, in order, each with who holds it. A question other than `extents`. */
  allocation(offset: number, length: number, visit: OwnershipVisitor): Pending
  /** 'read' until told: a layer is opened with a claim that refuses other writers, and written only as 'write'. */
  readonly access: Access
  /**
   * To 'write' takes the exclusive claim on the image (kind 'busy' when others use it, 'permission' or 'read-only' when
   * it cannot be written). To 'read' flushes, leaves the image clean for any other program, and gives the claim back.
   * No request may be in flight.
   */
  setAccess(access: Access): Promise<void>
  /** Makes the layer larger; what is added reads as zeros, whatever the backing holds there. Needs 'write'. */
  grow(size: number): Promise<void>
  /**
   * Rewrites the header's backing reference, durably; to undefined, no backing file is named any more, and what showed through
   * reads as zeros. Needs 'write'. Kind 'unsupported' where the format has none.
   */
  setBackingReference(backing: NamedBacking | undefined): Promise<void>
}

export interface BackingReference {
  /** As written in the header: absolute, or relative to the image's folder. */
  readonly name: string
  /** Undefined when the header does not say. */
  readonly format: string | undefined
}

/** A backing reference that says everything. */
export interface NamedBacking {
  readonly name: string
  readonly format: string
}

export type Access = 'read' | 'write'

/** Runs `next` when `pending` is done: at once, or after it. */
export function andThen(pending: Pending, next: () => Pending): Pending {
  return pending === undefined ? next() : pending.then(next)
}
