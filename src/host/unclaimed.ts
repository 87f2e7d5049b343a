// A host that takes no claims on images: whoever reads through it sees also what another process is writing. For tools that
// were told to look at an image in use; nothing is ever written through it.

import { BlockError } from '../block/error.ts'
import type { Host, HostFile } from './host.ts'

/** The same files, opened for reading only and without claims. */
export function withoutClaims(host: Host): Host {
  const refuse = (path: string): Promise<never> =>
    Promise.reject(new BlockError('read-only', `${path} was opened to look at while others use it`, { path }))
  return {
    open: (path, options): Promise<HostFile> =>
      options?.create === undefined || options.create === 'never' ? host.open(path) : refuse(path),
    status: (path) => host.status(path),
    realPath: (path) => host.realPath(path),
    list: (folder) => host.list(folder),
    makeFolder: refuse,
    rename: refuse,
    unlink: refuse,
    syncFolder: refuse,
    bootId: () => host.bootId(),
  }
}
