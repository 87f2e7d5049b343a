// A host whose files are read in the threads of Node's pool: for tools that read ahead while they write, and that keep nobody
// waiting. What is in the page cache is then copied by another processor, and what is not is fetched meanwhile.

import type { Host } from './host.ts'

/** The same host; every file is opened for the background. */
export function withBackgroundFiles(host: Host): Host {
  return {
    open: (path, options) => host.open(path, { ...options, background: true }),
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
