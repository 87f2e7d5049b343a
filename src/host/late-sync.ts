// A host for files that are worth nothing until they are whole: while such a file is filled nothing is synced, and when it is
// closed all of it is, once. Only for files whose name does not lead to them before that.

import type { Host, HostFile } from './host.ts'

/** The same host; files that are opened for writing are synced when they are closed, and not before. */
export function withLateSync(host: Host): Host {
  return {
    open: async (path, options) => lateSync(await host.open(path, options)),
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

function lateSync(file: HostFile): HostFile {
  if (!file.writable) return file
  let isSyncDue = false
  return {
    path: file.path,
    writable: true,
    size: () => file.size(),
    read: (offset, length, into, at) => file.read(offset, length, into, at),
    readNow: (offset, length, into, at) => file.readNow(offset, length, into, at),
    write: (offset, length, from, at) => file.write(offset, length, from, at),
    punch: (offset, length) => file.punch(offset, length),
    zero: (offset, length) => file.zero(offset, length),
    extents: (offset, length, visit) => file.extents(offset, length, visit),
    truncate: (size) => file.truncate(size),
    sync: async () => {
      isSyncDue = true
    },
    lock: (claim) => file.lock(claim),
    async close() {
      try {
        if (isSyncDue) await file.sync()
      } finally {
        await file.close()
      }
    },
  }
}
