// What the source of a migration asks of the other daemon, and is answered: plain data, and a device. How the two reach each other is
// handed in. docs/internals/migration.md has the conversation.

import type { BlockDevice } from '../block/device.ts'
import { BlockError } from '../block/error.ts'
import type { Format } from '../chain/open.ts'
import type { CacheMode } from '../host/cache-mode.ts'
import type { DiskRecord } from './catalog.ts'

/** Of the conversation; a target that speaks another one refuses. */
export const MIGRATION_PROTOCOL = 1

/** Begins a migration at its target. */
export interface IncomingRequest {
  readonly protocol: number
  /** 32 hexadecimal digits. */
  readonly token: string
  /** The disk's name there. */
  readonly disk: string
  /** Bytes, of the oldest snapshot or, without one, of the disk. */
  readonly size: number
  readonly format: Format
  /** Absolute path of the image that is made there; in the home's folder for images unless told. */
  readonly image?: string | undefined
  readonly cache: CacheMode
  /** Identity of the source's home, and how people there call it. */
  readonly home: string
  readonly from: string
}

/** A bitmap, without its bits. */
export interface BitmapShape {
  readonly name: string
  readonly granule: number
  readonly recording: boolean
  readonly meta: string
}

/** Some of a bitmap's bits: what `Bitmap.copyBytes` gives for byte `first` on, in base64. */
export interface BitmapPiece {
  readonly name: string
  readonly first: number
  readonly bits: string
}

/** What is asked of a target by the token. */
export type IncomingStep =
  | { readonly step: 'state' }
  /** What was copied becomes a snapshot; the disk goes on with `size` bytes. */
  | { readonly step: 'freeze'; readonly snapshot: string; readonly createdMs: number; readonly size: number }
  /** Bits to keep in memory until the seal; with `anew` those that were kept go first. */
  | {
      readonly step: 'bits'
      readonly anew: boolean
      readonly shapes: readonly BitmapShape[]
      readonly pieces: readonly BitmapPiece[]
    }
  /** The copy is whole: the bitmaps are these, with what was kept of their bits and these last ones. */
  | {
      readonly step: 'seal'
      readonly shapes: readonly BitmapShape[]
      readonly pieces: readonly BitmapPiece[]
      readonly bitmapsLost?: DiskRecord['bitmapsLost']
    }
  | { readonly step: 'take' }
  | { readonly step: 'refuse' }
  | { readonly step: 'release' }

export type IncomingState = 'unknown' | 'copying' | 'sealed' | 'taken'

export interface IncomingReply {
  /** Identity of the target's home. */
  readonly home: string
  readonly state: IncomingState
  /** The snapshots that it has, oldest first. */
  readonly snapshots: readonly string[]
}

/** The token's export at a target. A connection that was lost stays lost. */
export interface PeerLink {
  readonly device: BlockDevice
  /** Why it is of no use any more; undefined while it is. */
  lost(): BlockError | undefined
  /** Gives up a target that does not answer. */
  abandon(error: BlockError): void
}

/** Other daemons, by the URIs of their APIs. */
export interface Peers {
  prepare(to: string, request: IncomingRequest): Promise<IncomingReply>
  step(to: string, token: string, step: IncomingStep): Promise<IncomingReply>
  connect(to: string, token: string): Promise<PeerLink>
}

function unreachable(): never {
  throw new BlockError('unsupported', 'this engine knows no other daemons')
}

/** For an engine that is on its own. */
export const noPeers: Peers = {
  prepare: async () => unreachable(),
  step: async () => unreachable(),
  connect: async () => unreachable(),
}
