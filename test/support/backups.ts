// Helpers for tests of repositories: a disk as a plain array, backed up by runs and restored whole.

import assert from 'node:assert/strict'
import type { Random } from '../../src/base/random.ts'
import { roundDown, roundUp } from '../../src/base/round.ts'
import type { BlockDevice } from '../../src/block/device.ts'
import { type ErrorKind, isBlockError } from '../../src/block/error.ts'
import {
  type BackupInfo,
  type BackupWriter,
  initRepository,
  openRepository,
  type Repository,
  type RepositoryOptions,
} from '../../src/repository/repository.ts'
import { InlineSqueezer } from '../../src/repository/squeezer.ts'
import type { ObjectStore } from '../../src/repository/store.ts'

const GRANULE = 4096

/** A part of a disk that changed, in bytes. */
export interface Change {
  readonly offset: number
  readonly length: number
}

// Hashing in the calling thread: no thread to start and to end for each of many small repositories.
export const inline = (): RepositoryOptions => ({ squeezer: (vault) => new InlineSqueezer(vault) })
export const initInline = (store: ObjectStore): Promise<Repository> => initRepository(store, inline())
export const openInline = (store: ObjectStore): Promise<Repository> => openRepository(store, inline())

/** Begins a full backup at moment 1000. */
export function beginFull(repository: Repository, disks: { name: string; size: number }[]): Promise<BackupWriter> {
  return repository.begin({ machine: 'vm1', moment: 1000, kind: 'full', disks })
}

/** Random bytes. */
export function noise(random: Random, length: number): Buffer {
  const bytes = Buffer.alloc(length)
  random.fill(bytes)
  return bytes
}

/** Fails unless `work`, which may throw or reject, fails with the kind and says so. */
export async function failsWith(kind: ErrorKind, work: () => unknown, says: RegExp): Promise<void> {
  await assert.rejects(
    async () => work(),
    (error) => {
      assert.ok(isBlockError(error, kind), String(error))
      assert.match(error.message, says)
      return true
    },
  )
}

/** Backs up one disk, "sda": all of it without a parent, else the changes, which ascend. */
export async function backUp(
  repository: Repository,
  content: Uint8Array,
  parent?: { readonly id: string; readonly changes: readonly Change[] },
  moment = 1000,
): Promise<BackupInfo> {
  const writer = await repository.begin({
    machine: 'vm1',
    moment,
    kind: parent === undefined ? 'full' : 'incremental',
    disks: [{ name: 'sda', size: content.length, ...(parent && { parent: { backup: parent.id, disk: 'sda' } }) }],
  })
  try {
    for (const { offset, length } of parent?.changes ?? [{ offset: 0, length: content.length }]) {
      await writer.disk(0).write(offset, length, content, offset)
    }
    return await writer.finish()
  } catch (error) {
    await writer.abort()
    throw error
  }
}

/** The one disk of a full backup of this content, as a device. */
export async function openBackedUp(repository: Repository, content: Uint8Array): Promise<BlockDevice> {
  const { id } = await backUp(repository, content)
  const device = (await repository.openBackup(id)).disks[0]?.device
  if (device === undefined) throw new Error(`no disk in ${id}`)
  return device
}

/** All bytes of a disk of a backup. */
export async function restore(repository: Repository, id: string, disk = 0): Promise<Buffer> {
  const reader = await repository.openBackup(id)
  const device = reader.disks[disk]?.device
  if (device === undefined) throw new Error(`no disk ${disk} in ${id}`)
  const into = Buffer.alloc(device.size, 0xee)
  for (let offset = 0; offset < device.size; offset += 1_000_000) {
    await device.read(offset, Math.min(1_000_000, device.size - offset), into, offset)
  }
  await reader.close()
  return into
}

/** Changes `content` in places, data and zeros, and returns where: aligned, ascending, apart. */
export function changeSome(content: Uint8Array, random: Random, count: number, longest: number): Change[] {
  const changes: Change[] = []
  for (let i = 0; i < count; i++) {
    const offset = roundDown(random.below(content.length), GRANULE)
    const length = Math.min(content.length - offset, roundUp(random.between(1, longest), GRANULE))
    const part = content.subarray(offset, offset + length)
    if (random.chance(0.2)) part.fill(0)
    else if (random.chance(0.3)) part.fill(random.below(256))
    else random.fill(part)
    changes.push({ offset, length })
  }
  changes.sort((a, b) => a.offset - b.offset)
  const apart: Change[] = []
  for (const { offset, length } of changes) {
    const last = apart.at(-1)
    if (last === undefined || last.offset + last.length < offset) apart.push({ offset, length })
    else {
      const end = Math.max(last.offset + last.length, offset + length)
      apart[apart.length - 1] = { offset: last.offset, length: end - last.offset }
    }
  }
  return apart
}
