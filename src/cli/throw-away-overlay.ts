// A device that may be written over one that may not: what is written goes into an image of its own, which nobody finds later. Its
// file has no name any more as soon as it is open, so that its space comes back however the process ends.

import fs from 'node:fs'
import path from 'node:path'
import type { BlockDevice } from '../block/device.ts'
import { openLayer } from '../chain/open.ts'
import { createQcow2 } from '../format/qcow2/create.ts'
import { withCacheMode } from '../host/cache-mode.ts'
import { realHost } from '../host/real.ts'

/** `folder` is where the written data takes its space. Closing the overlay leaves `device` open. */
export async function openThrowAwayOverlay(device: BlockDevice, folder: string): Promise<BlockDevice> {
  // A flush of what is thrown away has nothing to do.
  const host = withCacheMode(realHost, 'unsafe')
  const own = fs.mkdtempSync(path.join(folder, 'varve-overlay-'))
  try {
    const image = path.join(own, 'overlay.qcow2')
    await createQcow2(host, image, { size: device.size })
    const layer = await openLayer(host, image, 'qcow2', device.name)
    layer.backing = device
    await layer.setAccess('write')
    return layer
  } finally {
    fs.rmSync(own, { recursive: true, force: true })
  }
}
