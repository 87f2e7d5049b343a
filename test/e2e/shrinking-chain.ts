// A disk with a long chain whose snapshots are deleted from the middle, one by one, until two layers are left, while the verifying load
// goes on. Every layer owns a part of the disk at random; what the whole must hold is kept in memory.
//
//   disk   | noise, written by all layers | the load's blocks |
//          0                             1/2

import assert from 'node:assert/strict'
import path from 'node:path'
import { Random } from '../../src/base/random.ts'
import { ChildDaemon } from '../../src/cli/demo/child-daemon.ts'
import { Load } from '../../src/cli/demo/load.ts'
import { connectNbd, type NbdClient } from '../../src/nbd/client.ts'
import { assertClean } from '../support/daemon.ts'

const MIB = 1024 * 1024
const DISK = 'vm1'
const PIECE = 64 * 1024
/** One of the load's blocks in so many bytes. */
const LOAD_EVERY = 16 * 1024
/** The part of the disk that each layer writes. */
const SHARE = 0.05

export interface ChainOptions {
  /** Empty; gets images, home and log. */
  readonly folder: string
  readonly sizeMiB: number
  readonly layers: number
  readonly seed: number
}

export class ShrinkingChain {
  readonly uri: string
  readonly #options: ChainOptions
  readonly #daemon: ChildDaemon
  readonly #client: NbdClient
  readonly #load: Load
  readonly #random: Random
  /** What the first half holds. */
  readonly #noise: Buffer
  #isOver = false

  private constructor(options: ChainOptions, daemon: ChildDaemon, uri: string, client: NbdClient, load: Load) {
    this.#options = options
    this.#daemon = daemon
    this.uri = uri
    this.#client = client
    this.#load = load
    this.#random = new Random(options.seed)
    this.#noise = Buffer.alloc((options.sizeMiB * MIB) / 2)
  }

  /** Makes the chain. */
  static async start(options: ChainOptions): Promise<ShrinkingChain> {
    const { folder, sizeMiB, layers, seed } = options
    const daemon = new ChildDaemon(path.join(folder, 'home'), path.join(folder, 'daemon.log'))
    try {
      await daemon.start()
      const size = sizeMiB * MIB
      const image = path.join(folder, 'disk.qcow2')
      const { uri = '' } = await daemon.api.call('addDisk', {}, { name: DISK, image, format: 'qcow2', size })
      const blocks = Array.from({ length: size / 2 / LOAD_EVERY }, (_, index) => size / 2 + index * LOAD_EVERY)
      const load = await Load.connect(uri, Float64Array.from(blocks), seed)
      const chain = new ShrinkingChain(options, daemon, uri, await connectNbd(uri), load)
      await load.sweep()
      load.start()
      await chain.#write(1)
      for (let layer = 1; layer < layers; layer++) {
        await daemon.api.call('createSnapshot', { disk: DISK }, { name: `s${layer}` })
        await chain.#write(SHARE)
      }
      return chain
    } catch (error) {
      await daemon.kill()
      throw error
    }
  }

  /** Layers that the disk has now, from base to active. */
  async layers(): Promise<readonly string[]> {
    const { layers } = await this.#daemon.api.call('showDisk', { disk: DISK }, {})
    return layers.map((layer) => layer.path)
  }

  /** Deletes the snapshot in the middle; says in which direction it was merged. */
  async deleteMiddle(): Promise<string> {
    const snapshots = await this.#daemon.api.call('listSnapshots', { disk: DISK }, {})
    const middle = snapshots[Math.floor(snapshots.length / 2)]
    assert.ok(middle !== undefined)
    const { id } = await this.#daemon.api.call('deleteSnapshot', { disk: DISK, snapshot: middle.name }, {})
    const { error, details } = await this.#daemon.api.follow(id, () => undefined)
    assert.equal(error, undefined)
    return String(details['direction'])
  }

  /** Runs work while the load rests. */
  async atRest<T>(work: () => Promise<T>): Promise<T> {
    await this.#load.stop()
    const result = await work()
    this.#load.start()
    return result
  }

  /** Fails unless the disk holds what was written; the load looks at its own part all the time. */
  async check(): Promise<void> {
    const piece = Buffer.alloc(PIECE)
    for (let at = 0; at < this.#noise.length; at += PIECE) {
      await this.#client.read(at, PIECE, piece, 0)
      assert.ok(piece.equals(this.#noise.subarray(at, at + PIECE)), `the disk differs at ${at}`)
    }
  }

  /** Ends load and daemon, and has QEMU look at the images that are left. */
  async finish(): Promise<void> {
    await this.#load.stop()
    await this.check()
    const layers = await this.layers()
    this.#isOver = true
    await Promise.all([this.#load.close(), this.#client.close()])
    await this.#daemon.stop()
    for (const layer of layers) assertClean(layer, 'after the last deletion')
  }

  /** Whatever happened. */
  async end(): Promise<void> {
    if (!this.#isOver) await Promise.all([this.#load.close(), this.#client.close()])
    await this.#daemon.kill()
  }

  get seed(): number {
    return this.#options.seed
  }

  /** Writes a part of the first half, in pieces at random. */
  async #write(share: number): Promise<void> {
    for (let at = 0; at < this.#noise.length; at += PIECE) {
      if (!this.#random.chance(share)) continue
      const length = share === 1 ? PIECE : 4096 * this.#random.between(1, PIECE / 4096)
      this.#random.fill(this.#noise.subarray(at, at + length))
      await this.#client.write(at, length, this.#noise, at, 0)
    }
  }
}
