// Whether an NBD server listens at a socket: QEMU has one server at most, and cannot be asked where it listens. At a path of ours only a QEMU
// listens whose server we started. The probe takes its leave as the protocol has it (NBD_OPT_ABORT), so that the server has nothing to complain of.
//
//   <- NBDMAGIC IHAVEOPT flags      -> flags IHAVEOPT ABORT 0

import net from 'node:net'
import { QMP_GREETING_MS } from '../../base/qemu-limits.ts'
import { NBD_FLAG_C_FIXED_NEWSTYLE, NBD_OPT_ABORT, NBD_OPTS_MAGIC } from '../../nbd/spec.ts'

/** True when a server says something there in time. */
export function listens(path: string): Promise<boolean> {
  return new Promise((resolve) => {
    const socket = net.connect({ path })
    let isThere = false
    socket.setTimeout(QMP_GREETING_MS, () => socket.destroy())
    socket.once('data', () => {
      isThere = true
      socket.end(leave())
    })
    socket.resume()
    socket.on('error', () => {})
    socket.once('close', () => resolve(isThere))
  })
}

function leave(): Buffer {
  const bytes = Buffer.alloc(20)
  bytes.writeUInt32BE(NBD_FLAG_C_FIXED_NEWSTYLE, 0)
  bytes.writeUInt32BE(NBD_OPTS_MAGIC[0], 4)
  bytes.writeUInt32BE(NBD_OPTS_MAGIC[1], 8)
  bytes.writeUInt32BE(NBD_OPT_ABORT, 12)
  return bytes
}
