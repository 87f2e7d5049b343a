// "Error values" of the specification, for what devices say of themselves; what the protocol refuses by its own rules is in
// commands.test.ts.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { RawPeer, serveDevice } from '../../test/support/nbd.ts'
import { enter, requestMessage, simpleReply } from '../../test/support/nbd-wire.ts'
import { REQUEST_MAX } from '../base/limits.ts'
import type { Capabilities, Pending } from '../block/device.ts'
import { toBlockError } from '../block/error.ts'
import { Filter } from '../block/filter.ts'
import { MemoryDevice } from '../block/memory.ts'
import { KIND_ERRNO, NBD_EIO, NBD_ENOMEM, NBD_ENOSPC, NBD_ENOTSUP, NBD_EOVERFLOW } from './spec.ts'

/** Fails each write as the operating system does. */
class Failing extends Filter {
  code = ''
  override write(): Pending {
    throw toBlockError(Object.assign(new Error(this.code), { code: this.code }), 'disk: write')
  }
}

test('Error values: a full file system, a quota and a file size limit are all ENOSPC', async (t) => {
  const device = new Failing(new MemoryDevice(4096))
  const { target } = await serveDevice(t, device)
  const peer = new RawPeer(target)
  t.after(() => peer.socket.destroy())
  await enter(peer)
  for (const [code, errno] of [
    ['ENOSPC', NBD_ENOSPC],
    ['EDQUOT', NBD_ENOSPC],
    ['EFBIG', NBD_ENOSPC],
    ['EIO', NBD_EIO],
    ['ENOMEM', NBD_EIO],
  ] as const) {
    device.code = code
    peer.send(requestMessage({ type: 1, data: Buffer.alloc(512) }))
    assert.equal(await simpleReply(peer), errno, code)
  }
})

test('Error values: no error of a device is ENOMEM, or one of those that have a meaning of their own', () => {
  const found = new Set(Object.values(KIND_ERRNO))
  for (const errno of [NBD_ENOMEM, NBD_EOVERFLOW, NBD_ENOTSUP]) assert.equal(found.has(errno), false, `${errno}`)
})

test('NBD_CMD_WRITE_ZEROES: fast zeroing is done or ENOTSUP at any length, and then changed nothing', async (t) => {
  class Zeroing extends Filter {
    speed: Capabilities['zero'] = 'native'
    override get can(): Capabilities {
      return { ...super.can, zero: this.speed }
    }
  }
  const memory = new MemoryDevice(REQUEST_MAX + 4096)
  const device = new Zeroing(memory)
  const { target } = await serveDevice(t, device)
  const peer = new RawPeer(target)
  t.after(() => peer.socket.destroy())
  await enter(peer)
  memory.bytes.fill(1)
  for (const [speed, errno, byte] of [
    ['emulated', NBD_ENOTSUP, 1],
    ['native', 0, 0],
  ] as const) {
    device.speed = speed
    peer.send(requestMessage({ type: 6, flags: 16, length: memory.size }))
    assert.equal(await simpleReply(peer), errno)
    assert.ok(memory.bytes.every((each) => each === byte))
  }
})
