// How much of the page cache an image has, in QEMU's words, as a host whose files are opened so.
//
//   writeback   reads and writes go through the page cache; a flush makes durable what was written
//   none        whole pages go past it, straight to the disk (direct-file.ts); a flush makes them durable
//   unsafe      as writeback, but a flush does nothing; the image is synced when it is closed

import type { Host } from './host.ts'
import { withLateSync } from './late-sync.ts'

export const CACHE_MODES = ['writeback', 'none', 'unsafe'] as const
export type CacheMode = (typeof CACHE_MODES)[number]

/** The same host, for the files of an image. */
export function withCacheMode(host: Host, mode: CacheMode): Host {
  if (mode === 'writeback') return host
  return mode === 'unsafe' ? withLateSync(host) : withDirectFiles(host)
}

/** What has to be said aloud of a mode; undefined where there is nothing. */
export function warningOf(mode: CacheMode): string | undefined {
  if (mode !== 'unsafe') return undefined
  return 'with --cache unsafe a flush does nothing: when this host crashes, what the guest wrote may be lost and the image damaged'
}

function withDirectFiles(host: Host): Host {
  return {
    open: (path, options) => host.open(path, { ...options, direct: true }),
    status: (path) => host.status(path),
    realPath: (path) => host.realPath(path),
    list: (folder) => host.list(folder),
    makeFolder: (folder) => host.makeFolder(folder),
    rename: (from, to) => host.rename(from, to),
    unlink: (path) => host.unlink(path),
    syncFolder: (folder) => host.syncFolder(folder),
    bootId: () => host.bootId(),
  }
}
