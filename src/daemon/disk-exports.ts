// The disks as NBD exports: each on a Unix socket of its own and, where the daemon listens on TCP, all of them there by name. With
// the device go the metadata contexts that QEMU's clients know: its bitmaps, and how deep in the chain the data lies.

import type { Bitmap } from '../bitmap/bitmap.ts'
import { allocationDepth } from '../chain/allocation-depth.ts'
import type { Disk } from '../chain/disk.ts'
import type { ServeDisk } from '../engine/context.ts'
import { type Export, type MetaContext, NbdServer } from '../nbd/server.ts'
import type { ServerTls } from '../nbd/tls.ts'
import { formatNbdUri } from '../nbd/uri.ts'

export interface TcpOptions {
  /** The address to listen on; beyond loopback only with TLS, unless `insecure`. */
  readonly address: string
  /** 0 lets the system choose. */
  readonly port: number
  readonly tls?: ServerTls
  readonly insecure?: boolean
}

export class DiskExports {
  readonly #served = new Map<string, Export>()
  #tcp: NbdServer | undefined

  /** Listens for all disks; returns the port. Kinds as for NbdServer's listenTcp. */
  async listen({ address, port, ...how }: TcpOptions): Promise<number> {
    const server = new NbdServer({ find: (name) => this.#served.get(name), list: () => [...this.#served.values()] })
    const found = await server.listenTcp(address, port, how)
    this.#tcp = server
    return found
  }

  /** Serves a disk on a Unix socket, and on TCP as long as that is open. */
  readonly serve: ServeDisk = async (disk, socket) => {
    const served: Export = {
      name: disk.name,
      device: disk,
      get contexts() {
        return contextsOf(disk)
      },
    }
    const server = new NbdServer({
      find: (name) => (name === disk.name || name === '' ? served : undefined),
      list: () => [served],
    })
    await server.listenUnix(socket, { mode: 0o660 })
    this.#served.set(disk.name, served)
    return {
      uri: formatNbdUri({ transport: 'unix', path: socket, name: disk.name }),
      close: async () => {
        this.#served.delete(disk.name)
        await Promise.all([this.#tcp?.withdraw(served), server.close()])
      },
    }
  }

  async close(): Promise<void> {
    await this.#tcp?.close()
  }
}

/** The contexts of a disk at this moment, besides base:allocation. */
function contextsOf(disk: Disk): MetaContext[] {
  const bitmaps = [...disk.log.bitmaps.values()].filter(
    ({ name, state }) => state === 'valid' && !name.startsWith('job:'),
  )
  const depth: MetaContext = {
    name: 'qemu:allocation-depth',
    extents: (offset, length, visit) => disk.admit(() => allocationDepth(disk.chain.layers, offset, length, visit)),
  }
  return [
    depth,
    ...bitmaps.map(({ name }) => ({
      name: `qemu:dirty-bitmap:${name}`,
      extents: (offset: number, length: number, visit: (length: number, status: number) => boolean) => {
        // Looked up anew: a backup may have put another one in its place.
        const bitmap = disk.log.bitmaps.get(name)?.bits
        if (bitmap !== undefined) visitBits(bitmap, offset, length, visit)
        else visit(length, 1)
        return undefined
      },
    })),
  ]
}

/** The range as clean (0) and dirty (1) pieces. */
function visitBits(
  bitmap: Bitmap,
  offset: number,
  length: number,
  visit: (length: number, status: number) => boolean,
): void {
  const end = offset + length
  let at = offset
  bitmap.runs(offset, end, length, (start, dirty) => {
    if (start > at && !visit(start - at, 0)) {
      at = end
      return false
    }
    at = start + dirty
    return visit(dirty, 1)
  })
  if (at < end) visit(end - at, 0)
}
