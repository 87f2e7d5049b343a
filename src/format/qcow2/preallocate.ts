// Gives the clusters of a disk their places ahead of use: a place for each in the map (`Preallocator`), and space for those on
// the host (`fillPlaces`). What is preallocated reads as before: zeros, or what lies below.

import { Breather } from '../../base/breather.ts'
import { COPY_PIECE } from '../../base/limits.ts'
import { roundDown, roundUp } from '../../base/round.ts'
import { type Pending, ZERO } from '../../block/device.ts'
import type { HostFile } from '../../host/host.ts'
import type { Changes } from './changes.ts'
import { NO_PLACE } from './mapping.ts'
import type { MappingVisitor } from './reader.ts'
import type { Writer } from './writer.ts'

/** What is given: nothing, places in the map, places with space on the host, or those filled with zeros. */
export type Preallocation = 'off' | 'metadata' | 'falloc' | 'full'

export class Preallocator {
  readonly #changes: Changes

  constructor(changes: Changes) {
    this.#changes = changes
  }

  /** Gives each cluster of the range that has none a place in the map. */
  async run(offset: number, end: number): Promise<void> {
    const changes = this.#changes
    const breather = new Breather()
    const { clusterSize } = changes.image.header
    const stop = roundUp(end, clusterSize)
    for (let at = roundDown(offset, clusterSize); at < stop; ) {
      const wait = changes.tables.find(at, stop - at) ? changes.obstacle(at, clusterSize) : changes.tables.load(at)
      if (wait !== undefined) await wait
      else at += await this.#step(at, stop)
      await breather.pause()
    }
  }

  /** Does what lies in one slice, and can be done at once; gives how many bytes. */
  async #step(offset: number, stop: number): Promise<number> {
    const changes = this.#changes
    const { clusterSize } = changes.image.header
    const { tables, places } = changes
    if (!tables.find(offset, stop - offset)) return 0
    const length = Math.min(tables.length, tables.roomInSlice(offset) * clusterSize)
    // What has a place or is a compressed cluster stays as it is.
    if (tables.host !== NO_PLACE) return roundUp(length, clusterSize)
    const count = roundUp(length, clusterSize) / clusterSize
    const token = changes.lock(offset, count * clusterSize)
    try {
      if (changes.hasDataFile) await this.#clear(offset, count * clusterSize)
      const fresh = changes.hasDataFile ? undefined : await places.take(offset, count)
      if (fresh !== undefined) await places.extendOver(fresh)
      const taken = fresh?.count ?? count
      const host = fresh === undefined ? offset : fresh.cluster * clusterSize
      await tables.withEntry(offset, 1, () => tables.reserve(offset, taken * clusterSize, host))
      return taken * clusterSize
    } finally {
      changes.release(token)
    }
  }

  /** A data file may hold anything where nothing is mapped to it: zeros, before it shows. */
  async #clear(offset: number, length: number): Promise<void> {
    const { data, sync } = this.#changes
    const present = Math.min(length, Math.max(0, data.size() - offset))
    let isZero = true
    await data.extents(offset, present, (_piece, extent) => {
      isZero = (extent & ZERO) !== 0
      return isZero
    })
    if (isZero) return
    await data.punch(offset, length)
    await sync.run()
  }
}

/** What is asked of an image. */
interface Mapped {
  readonly size: number
  mappings(offset: number, length: number, visit: MappingVisitor): Pending
}

/** See `Qcow2Image.preallocate`; `data` is the file that holds the guest's data. */
export async function preallocate(
  image: Mapped,
  writer: Writer,
  data: HostFile,
  offset: number,
  how: Preallocation,
): Promise<void> {
  if (how === 'off') return
  await writer.preallocate(offset, image.size)
  await writer.finish()
  if (how !== 'metadata') await fillPlaces(image, data, offset, how)
}

/** Gives the places of the disk from `offset` on, which hold zeros, space on the host. Durable on return. */
async function fillPlaces(image: Mapped, data: HostFile, offset: number, how: 'falloc' | 'full'): Promise<void> {
  const breather = new Breather()
  const zeros = new Uint8Array(how === 'full' ? COPY_PIECE : 0)
  for (let at = offset; at < image.size; ) {
    const wanted = Math.min(COPY_PIECE, image.size - at)
    let length = wanted
    let place = NO_PLACE
    await image.mappings(at, wanted, (piece, _kind, host) => {
      length = piece
      place = host
      return false
    })
    if (place !== NO_PLACE && how === 'full') await data.write(place, length, zeros, 0)
    else if (place !== NO_PLACE) await data.zero(place, length)
    at += length
    await breather.pause()
  }
  await data.sync()
}
