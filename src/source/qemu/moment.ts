// A moment of the disks of a running QEMU, readable over NBD while its guest writes on, with nothing of it left afterwards. Each disk gets an
// anchor, a node that passes everything on, between the guest's device and its image; then one command puts a filter behind all anchors, in
// between two requests of all of them: that is the moment. The filter saves old data to scratch before it is overwritten; when that fails it is
// the view that breaks, not the guest's write.
//
//   before     device -> anchor -> image
//   since      device -> anchor -> filter -> image
//                                    |  `-> scratch
//              NBD export -> view ---'

import { QMP_MOMENT_CBW_S } from '../../base/qemu-limits.ts'
import { BlockError, isBlockError } from '../../block/error.ts'
import { formatNbdUri } from '../../nbd/uri.ts'
import type { NodeRole } from './names.ts'
import type { QmpClient } from './qmp-client.ts'

export interface MomentDisk {
  /** What the guest's device writes to, the node that has the bitmaps, and the device. */
  readonly top: string
  readonly node: string
  readonly device: string
  /** The bits to show, of a bitmap of the node; and the bitmap that is made of them for that. */
  readonly bits?: { readonly of: string; readonly frozen: string } | undefined
  /** The bitmap that records from the moment on, at this granularity in bytes; it may hold a little from before. */
  readonly recording: { readonly name: string; readonly granularity: number; readonly persistent: boolean }
  /** A qcow2 image as large as the disk, and the bytes that its file may have. */
  readonly scratch: { readonly path: string; readonly bytes: number }
}

export interface MomentOptions {
  readonly disks: readonly MomentDisk[]
  readonly name: (role: NodeRole, disk: number) => string
  /** Where QEMU is to serve NBD. */
  readonly socket: string
}

/** Puts the anchors in, and makes what saves old data; the guest notices nothing. */
export async function prepareMoment(client: QmpClient, { disks, name }: MomentOptions): Promise<void> {
  for (const [index, { top, device, scratch }] of disks.entries()) {
    const file = { driver: 'raw', size: scratch.bytes, file: { driver: 'file', filename: scratch.path } }
    await client.execute('blockdev-add', { driver: 'qcow2', 'node-name': name('scratch', index), file })
    await client.execute('blockdev-add', {
      driver: 'copy-before-write',
      'node-name': name('filter', index),
      file: top,
      target: name('scratch', index),
      'on-cbw-error': 'break-snapshot',
      'cbw-timeout': QMP_MOMENT_CBW_S,
    })
    await client.execute('blockdev-add', { driver: 'raw', 'node-name': name('anchor', index), file: top })
    await client.execute('qom-set', { path: device, property: 'drive', value: name('anchor', index) })
  }
}

/**
 * Takes the moment. The new bitmaps record from before it, and the bits to show are taken after it: what is in both for that is copied once
 * more than it must be, and nothing is in neither.
 */
export async function takeMoment(client: QmpClient, { disks, name }: MomentOptions): Promise<void> {
  const begin = disks.map(({ node, recording }) => action('block-dirty-bitmap-add', { node, ...recording }))
  await client.execute('transaction', { actions: begin })
  const options = disks.map((_disk, index) => {
    return { driver: 'raw', 'node-name': name('anchor', index), file: name('filter', index) }
  })
  await client.execute('blockdev-reopen', { options })
  const freeze = disks.flatMap(({ node, bits, recording: { granularity } }) => {
    if (bits === undefined) return []
    const { of, frozen } = bits
    return [
      action('block-dirty-bitmap-add', { node, name: frozen, granularity, disabled: true }),
      action('block-dirty-bitmap-merge', { node, target: frozen, bitmaps: [of] }),
    ]
  })
  if (freeze.length > 0) await client.execute('transaction', { actions: freeze })
}

/** Serves the moment; returns the URI of each disk, in their order. A reader says by TRIM what it has, and nothing of that is saved any more. */
export async function exportMoment(
  client: QmpClient,
  { disks, name, socket }: MomentOptions,
  isServing: boolean,
): Promise<string[]> {
  if (!isServing) await startServer(client, socket)
  for (const [index, { node, bits }] of disks.entries()) {
    const view = name('view', index)
    await client.execute('blockdev-add', { driver: 'snapshot-access', 'node-name': view, file: name('filter', index) })
    await client.execute('block-export-add', {
      type: 'nbd',
      id: name('export', index),
      'node-name': view,
      name: name('export', index),
      // For TRIM; the view itself takes no write.
      writable: true,
      ...(bits && { bitmaps: [{ node, name: bits.frozen }] }),
    })
  }
  return disks.map((_disk, index) => formatNbdUri({ transport: 'unix', path: socket, name: name('export', index) }))
}

/** Kind 'busy' when QEMU's NBD server, of which it has one, is somebody else's; it says so by no class of its own. */
async function startServer(client: QmpClient, socket: string): Promise<void> {
  try {
    await client.execute('nbd-server-start', { addr: { type: 'unix', data: { path: socket } } })
  } catch (error) {
    if (!isBlockError(error, 'io')) throw error
    const advice = `QEMU has one NBD server: where another program uses it, end that first (nbd-server-stop); else QEMU must be able to make ${socket}`
    throw new BlockError('busy', `${error.message}. ${advice}`, { path: socket })
  }
}

function action(type: string, data: object): object {
  return { type, data }
}
