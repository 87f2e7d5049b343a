// Compresses clusters as QEMU does, in threads of Node's pool: one compressor for each cluster that is to be under way at once.
// A compressor keeps its tables from one cluster to the next, which is what makes it fast; each cluster is a stream or frame
// of its own all the same.

import zlib from 'node:zlib'

/** QEMU reads raw deflate with a window of 4 KiB; levels are the default ones of both libraries. */
const ZLIB_OPTIONS = { windowBits: 12, memLevel: 9, flush: zlib.constants.Z_FINISH } as const
const ZSTD_OPTIONS = { flush: zlib.constants.ZSTD_e_end } as const

/** Compressed clusters are cut out of buffers of so many clusters: with room to spare, they are compressed in one go. */
const CLUSTERS_PER_BUFFER = 2

export class ClusterCompressor {
  readonly #stream: zlib.DeflateRaw | zlib.ZstdCompress
  readonly #deflate: zlib.DeflateRaw | undefined
  readonly #clusterSize: number
  #pieces: Buffer[] = []
  #failure: Error | undefined

  constructor(type: 'zlib' | 'zstd', clusterSize: number) {
    const chunkSize = clusterSize * CLUSTERS_PER_BUFFER
    this.#clusterSize = clusterSize
    this.#deflate = type === 'zlib' ? zlib.createDeflateRaw({ ...ZLIB_OPTIONS, chunkSize }) : undefined
    this.#stream = this.#deflate ?? zlib.createZstdCompress({ ...ZSTD_OPTIONS, chunkSize })
    this.#stream.on('data', (piece: Buffer) => this.#pieces.push(piece))
    this.#stream.on('error', (error) => {
      this.#failure = error
    })
  }

  /**
   * The compressed bytes of a whole cluster, or undefined when they would not be fewer. The cluster must not change until then;
   * one at a time.
   */
  async compress(cluster: Uint8Array): Promise<Uint8Array | undefined> {
    this.#pieces = []
    // A frame of zstd ends with the cluster, and the next begins by itself; deflate has to be told.
    this.#deflate?.reset()
    await new Promise<void>((resolve, reject) =>
      this.#stream.write(cluster, (error) => (error === null || error === undefined ? resolve() : reject(error))),
    )
    if (this.#failure !== undefined) throw this.#failure
    const [first] = this.#pieces
    const packed = this.#pieces.length === 1 ? first : Buffer.concat(this.#pieces)
    return packed !== undefined && packed.length < this.#clusterSize ? packed : undefined
  }

  close(): void {
    this.#stream.destroy()
  }
}
