// A store in a folder of the host: each object is a file, created beside its name and renamed when it is durable.
//
//   put    NAME.part, claimed   write   sync   rename to NAME   sync the folder
//
// The claim on NAME.part makes creation exclusive between processes: who holds it looks whether NAME exists and is the only
// one who may rename. A crash leaves a .part file at most, which is no object.

import path from 'node:path'
import { assert } from '../../base/assert.ts'
import { Breather } from '../../base/breather.ts'
import { STORE_WRITE_BYTES } from '../../base/limits.ts'
import { BlockError, isBlockError } from '../../block/error.ts'
import type { Host, HostFile } from '../../host/host.ts'
import { isKey, type ObjectStatus, type ObjectStore } from '../store.ts'

const PART = '.part'

export class DirectoryStore implements ObjectStore {
  readonly name: string
  readonly #host: Host
  readonly #made = new Map<string, Promise<void>>()

  /** `folder` is an absolute path; it is made at the first put when it is missing. */
  constructor(host: Host, folder: string) {
    this.#host = host
    this.name = folder
  }

  async put(key: string, parts: readonly Uint8Array[]): Promise<void> {
    assert(isKey(key) && !key.endsWith(PART), `"${key}" is no key of an object`)
    const target = this.#path(key)
    const folder = path.dirname(target)
    await this.#make(folder)
    const file = await this.#claim(key, target)
    let left = target + PART
    try {
      if ((await this.#host.status(target)) !== undefined) throw this.#exists(key)
      await this.#fill(file, parts)
      await this.#host.rename(left, target)
      left = target
      await this.#host.syncFolder(folder)
    } catch (error) {
      // What failed is what the caller must hear; a .part that cannot be removed is no object.
      await this.#host.unlink(left).catch(() => undefined)
      throw error
    } finally {
      await file.close()
    }
  }

  async get(key: string): Promise<Uint8Array> {
    return this.#reading(key, async (file) => this.#read(file, 0, file.size()))
  }

  async getRange(key: string, offset: number, length: number, into?: Uint8Array): Promise<Uint8Array> {
    return this.#reading(key, async (file) => {
      if (offset + length <= file.size()) return this.#read(file, offset, length, into)
      const message = `${file.path} has ${file.size()} bytes, fewer than ${length} at ${offset}: it was cut short`
      throw new BlockError('out-of-range', message, { path: file.path, offset, length })
    })
  }

  async status(key: string): Promise<ObjectStatus | undefined> {
    const status = await this.#host.status(this.#path(key))
    return status === undefined ? undefined : { size: status.size, createdMs: status.modifiedMs }
  }

  async list(prefix: string): Promise<string[]> {
    assert(prefix === '' || prefix.endsWith('/'), 'a prefix is a folder')
    const names = await this.#host.list(path.join(this.name, prefix))
    const keys: string[] = []
    for (const name of names) {
      const key = prefix + name
      if (name.endsWith(PART) || !isKey(key)) continue
      if (prefix !== '') keys.push(key)
      else if ((await this.#host.status(this.#path(key)))?.kind !== 'folder') keys.push(key)
      else keys.push(...(await this.list(`${key}/`)))
    }
    return keys
  }

  async remove(key: string): Promise<void> {
    const target = this.#path(key)
    if ((await this.#host.status(target)) === undefined) return
    await this.#host.unlink(target)
    await this.#host.syncFolder(path.dirname(target))
  }

  #path(key: string): string {
    return path.join(this.name, key)
  }

  #exists(key: string): BlockError {
    return new BlockError('exists', `${this.#path(key)} exists already`, { path: this.#path(key) })
  }

  /** Makes a folder of the store durable, once. */
  #make(folder: string): Promise<void> {
    const known = this.#made.get(folder)
    if (known !== undefined) return known
    const making = (async () => {
      const missing: string[] = []
      for (let at = folder; (await this.#host.status(at)) === undefined; at = path.dirname(at)) missing.push(at)
      await this.#host.makeFolder(folder)
      for (const made of missing) await this.#host.syncFolder(path.dirname(made))
    })()
    this.#made.set(folder, making)
    making.catch(() => this.#made.delete(folder))
    return making
  }

  async #claim(key: string, target: string): Promise<HostFile> {
    try {
      return await this.#host.open(target + PART, {
        write: true,
        create: 'if-missing',
        lock: 'write',
        background: true,
      })
    } catch (error) {
      // Somebody else creates the same object at this moment.
      if (isBlockError(error, 'busy')) throw this.#exists(key)
      throw error
    }
  }

  async #fill(file: HostFile, parts: readonly Uint8Array[]): Promise<void> {
    const breather = new Breather()
    await file.truncate(0)
    let offset = 0
    for (const part of parts) {
      for (let at = 0; at < part.length; at += STORE_WRITE_BYTES) {
        const length = Math.min(STORE_WRITE_BYTES, part.length - at)
        await file.write(offset, length, part, at)
        offset += length
        await breather.pause()
      }
    }
    await file.sync()
  }

  async #read(file: HostFile, offset: number, length: number, into?: Uint8Array): Promise<Uint8Array> {
    const bytes = into?.subarray(0, length) ?? Buffer.allocUnsafeSlow(length)
    await file.read(offset, length, bytes, 0)
    return bytes
  }

  async #reading<T>(key: string, work: (file: HostFile) => Promise<T>): Promise<T> {
    const file = await this.#host.open(this.#path(key), { background: true })
    try {
      return await work(file)
    } finally {
      await file.close()
    }
  }
}
