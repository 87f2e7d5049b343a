// The lowest layer of a disk that is restored while its guest runs: a disk of a backup, whose repository is read on demand. While the
// repository is away requests wait for it, or fail, as the user has it; what is wrong with the backup itself fails in any case. What a guest
// has asked for is noted, so that the copying can bring it next. It writes nothing.
//
//   guest -> Disk -> chain -> image, what it owns
//                         \-> BackupLayer -> repository          job -> source -> repository, without waiting

import { REPOSITORY_RETRY_MAX_MS, REPOSITORY_RETRY_MIN_MS } from '../base/limits.ts'
import {
  type BlockDevice,
  type ExtentVisitor,
  type Layer,
  OWNED_DATA,
  type OwnershipVisitor,
  type Pending,
} from '../block/device.ts'
import { BlockError, isBlockError, toBlockError } from '../block/error.ts'
import { READ_ONLY } from '../block/read-only-device.ts'
import type { StreamSource } from '../job/stream.ts'
import type { Wanted } from '../job/wanted.ts'

/** In the catalog, in place of an image's format. */
export const BACKUP_FORMAT = 'backup'

/** What requests do while the repository is away: they wait, or fail with why. */
export const WHEN_AWAY = ['hold', 'report'] as const
export type WhenAway = (typeof WHEN_AWAY)[number]

/** A disk of a backup that is open, and held. */
export interface OpenedBackup {
  readonly device: BlockDevice
  /** Whether the repository answers. */
  isReachable(): Promise<boolean>
  /** Leaves the backup held. */
  close(): Promise<void>
}

export interface BackupLayerOptions {
  /** Of the disk that is restored. */
  readonly name: string
  /** What the header of the image above names as its backing file; it is none. */
  readonly place: string
  /** Bytes. */
  readonly size: number
  readonly open: () => Promise<OpenedBackup>
  /** One that is open already. */
  readonly opened?: OpenedBackup | undefined
  readonly whenAway: WhenAway
  readonly wanted: Wanted
  /** Hears when the repository is away, and when it is back. */
  readonly report: (message: string) => void
}

type Ask = (device: BlockDevice) => Pending

export class BackupLayer implements Layer {
  readonly name: string
  readonly path: string
  readonly size: number
  readonly format = BACKUP_FORMAT
  readonly clusterSize = 4096
  readonly backingReference = undefined
  readonly access = 'read'
  readonly can = READ_ONLY
  backing: BlockDevice | undefined
  /** Where the copying reads: it never waits for the repository, and nothing that it reads counts as wanted. */
  readonly source: StreamSource
  readonly wanted: Wanted
  readonly #options: BackupLayerOptions
  #opened: OpenedBackup | undefined
  #opening: Promise<OpenedBackup> | undefined
  #away: string | undefined
  #holding = 0
  #isClosed = false
  /** Rejects when what waits is not to wait any longer. */
  readonly #letGo = Promise.withResolvers<never>()

  constructor(options: BackupLayerOptions) {
    this.#options = options
    this.name = `${options.name}/${options.place}`
    this.path = options.place
    this.size = options.size
    this.wanted = options.wanted
    this.#opened = options.opened
    this.#letGo.promise.catch(() => undefined)
    this.source = {
      size: options.size,
      read: (offset, length, into, at) => this.#ask((device) => device.read(offset, length, into, at), 'report'),
      extents: (offset, length, visit) => this.#extents(offset, length, visit, 'report'),
    }
  }

  /** Why the repository cannot be read now; undefined while it can. */
  get away(): string | undefined {
    return this.#away
  }

  /** Requests wait for the repository. */
  get isHolding(): boolean {
    return this.#holding > 0
  }

  read(offset: number, length: number, into: Uint8Array, at: number): Pending {
    this.wanted.add(offset, length)
    return this.#ask((device) => device.read(offset, length, into, at), this.#options.whenAway)
  }

  write(): Pending {
    throw this.#refusal()
  }

  zero(): Pending {
    throw this.#refusal()
  }

  trim(): Pending {
    throw this.#refusal()
  }

  flush(): Pending {
    return undefined
  }

  extents(offset: number, length: number, visit: ExtentVisitor): Pending {
    return this.#extents(offset, length, visit, this.#options.whenAway)
  }

  allocation(_offset: number, length: number, visit: OwnershipVisitor): Pending {
    visit(length, OWNED_DATA)
    return undefined
  }

  async setAccess(access: 'read' | 'write'): Promise<void> {
    if (access === 'write') throw this.#refusal()
  }

  async grow(): Promise<void> {
    throw this.#refusal()
  }

  async setBackingReference(): Promise<void> {
    throw this.#refusal()
  }

  /** What waits for the repository fails, with kind 'closed', now and later: the daemon stops, or the disk goes. */
  letGo(): void {
    this.#letGo.reject(this.#closedError())
  }

  /** Leaves the backup held. */
  async close(): Promise<void> {
    if (this.#isClosed) return
    this.#isClosed = true
    this.letGo()
    const opened = this.#opened ?? (await this.#opening?.catch(() => undefined))
    this.#opened = undefined
    await opened?.close()
  }

  #ask(ask: Ask, whenAway: WhenAway): Pending {
    const opened = this.#opened
    if (opened === undefined) return this.#persist(ask, whenAway, undefined)
    const pending = ask(opened.device)
    if (pending === undefined) return undefined
    if (this.#away !== undefined) return this.#again(pending, ask, whenAway)
    return pending.catch((error: unknown) => this.#persist(ask, whenAway, error))
  }

  /** While the repository was away when last asked: what it answers says that it is back. */
  async #again(pending: Promise<void>, ask: Ask, whenAway: WhenAway): Promise<void> {
    try {
      await pending
      this.#noteBack()
    } catch (error) {
      await this.#persist(ask, whenAway, error)
    }
  }

  /** Collected first: an answer that breaks off is asked for again from its start. */
  async #extents(offset: number, length: number, visit: ExtentVisitor, whenAway: WhenAway): Promise<void> {
    const pieces: number[] = []
    const pending = this.#ask((device) => {
      pieces.length = 0
      return device.extents(offset, length, (piece, extent) => pieces.push(piece, extent) > 0)
    }, whenAway)
    if (pending !== undefined) await pending
    for (let i = 0; i < pieces.length; i += 2) if (!visit(pieces[i] as number, pieces[i + 1] as number)) return
  }

  /** Asks until there is an answer, or an error that is none of the repository's absence; `failure` is what the last attempt met. */
  async #persist(ask: Ask, whenAway: WhenAway, failure: unknown): Promise<void> {
    let waitMs = REPOSITORY_RETRY_MIN_MS
    let isHeld = false
    let wasThere = false
    let last = failure
    try {
      for (;;) {
        if (last !== undefined) {
          if (this.#isClosed) throw this.#closedError()
          const isThere = await this.#isThere()
          // Once more all the same: it may have come back since the request failed.
          if (!isBlockError(last) || (isThere && wasThere)) throw last
          wasThere = isThere
          if (!isThere) {
            this.#noteAway(last)
            if (whenAway === 'report') throw this.#awayError(last)
            if (!isHeld) this.#holding++
            isHeld = true
            await this.#wait(waitMs)
            waitMs = Math.min(waitMs * 2, REPOSITORY_RETRY_MAX_MS)
          }
        }
        try {
          const { device } = this.#opened ?? (await this.#open())
          const pending = ask(device)
          if (pending !== undefined) await pending
          return this.#noteBack()
        } catch (error) {
          last = error
        }
      }
    } finally {
      if (isHeld) this.#holding--
    }
  }

  async #isThere(): Promise<boolean> {
    if ((await this.#opened?.isReachable()) !== true) return false
    this.#noteBack()
    return true
  }

  #wait(ms: number): Promise<void> {
    let timer: NodeJS.Timeout | undefined
    const over = new Promise<void>((resolve) => (timer = setTimeout(resolve, ms)))
    return Promise.race([over, this.#letGo.promise]).finally(() => clearTimeout(timer))
  }

  /** One attempt for all that ask meanwhile. */
  #open(): Promise<OpenedBackup> {
    this.#opening ??= this.#openOnce().finally(() => (this.#opening = undefined))
    return this.#opening
  }

  async #openOnce(): Promise<OpenedBackup> {
    const opened = await this.#options.open()
    if (this.#isClosed) {
      await opened.close()
      throw this.#closedError()
    }
    this.#opened = opened
    return opened
  }

  #noteAway(error: BlockError): void {
    if (this.#away === undefined)
      this.#options.report(`${this.name}: the repository is away, and its guest waits or fails: ${error.message}`)
    this.#away = error.message
  }

  #noteBack(): void {
    if (this.#away !== undefined) this.#options.report(`${this.name}: the repository is back`)
    this.#away = undefined
  }

  #awayError(cause: BlockError): BlockError {
    const { message } = toBlockError(cause, this.name)
    return new BlockError('io', `${this.name}: the repository is away: ${message}`, { device: this.name }, cause)
  }

  #closedError(): BlockError {
    return new BlockError('closed', `${this.name} is closed`, { device: this.name })
  }

  #refusal(): BlockError {
    return new BlockError('read-only', `${this.name} is a backup, which nobody writes`, { device: this.name })
  }
}
