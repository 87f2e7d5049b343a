// Starts several servers, each on an image of its own, has them measured in turn, and ends them whatever happens.

import path from 'node:path'
import { type ImageFormat, makeImage } from './images.ts'
import type { Bench } from './part.ts'
import { type Place, type RunningServer, type ServerKind, startServer } from './servers.ts'

export interface Started {
  readonly program: string
  readonly server: RunningServer
  readonly image: string
}

export interface Images {
  readonly format: ImageFormat
  readonly folder: string
  readonly isUncached?: boolean
  /** A Unix socket in the folder unless told. */
  readonly place?: () => Promise<Place>
}

/** Those of the servers that are installed and know the format. */
export async function withServers<T>(
  bench: Bench,
  kinds: readonly ServerKind[],
  images: Images,
  work: (started: readonly Started[]) => Promise<T>,
): Promise<T> {
  const { format, folder } = images
  const started: Started[] = []
  try {
    for (const kind of kinds) {
      if (!kind.formats.includes(format) || !bench.has(kind.name, kind.version())) continue
      const image = path.join(folder, `${kind.name.replaceAll(' ', '-')}.${format}`)
      makeImage(image, format, bench.imageMiB)
      const place = (await images.place?.()) ?? { socket: `${image}.sock` }
      const serving = { image, format, place, isUncached: images.isUncached ?? false }
      started.push({ program: kind.name, server: await startServer(kind, serving), image })
    }
    return await work(started)
  } finally {
    for (const { server } of started) await server.stop()
  }
}
