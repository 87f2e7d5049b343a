// A disk as an NBD export on a Unix socket of its own. With the device go the metadata contexts that QEMU's clients know: its
// bitmaps, and how deep in the chain the data lies.

import type { Bitmap } from '../bitmap/bitmap.ts'
import { visitBits } from '../bitmap/visit-bits.ts'
import { allocationDepth } from '../chain/allocation-depth.ts'
import type { Disk } from '../chain/disk.ts'
import type { ServeDisk, ServeView, Served } from '../engine/context.ts'
import { type Export, type MetaContext, NbdServer } from '../nbd/server.ts'
import { formatNbdUri } from '../nbd/uri.ts'

/** Serves a disk on a Unix socket, under its name or another, and as the default export. */
export const serveDisk: ServeDisk = (disk, socket, name = disk.name) => {
  const served: Export = {
    name,
    device: disk,
    get contexts() {
      return contextsOf(disk)
    },
  }
  return serve(served, socket)
}

/** Serves a device on a Unix socket in the same way, for reading only but for what TRIM says to a view. */
export const serveView: ServeView = (device, socket, how) => {
  const { changed, ...events } = how ?? {}
  const readOnly = device.can.trim === 'none' || how === undefined
  return serve(
    { name: device.name, device, readOnly, ...events, ...(changed && { contexts: [dirty(changed)] }) },
    socket,
  )
}

function dirty({ name, bits }: { readonly name: string; readonly bits: Bitmap }): MetaContext {
  return {
    name: `qemu:dirty-bitmap:${name}`,
    extents: (offset, length, visit) => {
      visitBits(bits, offset, length, visit)
      return undefined
    },
  }
}

async function serve(served: Export, socket: string): Promise<Served> {
  const { name } = served
  const server = new NbdServer({
    find: (wanted) => (wanted === name || wanted === '' ? served : undefined),
    list: () => [served],
  })
  await server.listenUnix(socket, { mode: 0o660 })
  const uri = formatNbdUri({ transport: 'unix', path: socket, name })
  return { uri, close: () => server.close(), sever: () => server.sever() }
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
