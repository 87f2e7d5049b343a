import assert from 'node:assert/strict'
import fs from 'node:fs'
import path from 'node:path'
import { test } from 'node:test'
import { tempFolder } from '../../test/support/temp.ts'
import { HOLE, MAY_UNMAP, ZERO } from '../block/device.ts'
import { listExtents } from '../block/extents.ts'
import { realHost } from '../host/real.ts'
import { syscalls } from '../host/syscalls.ts'
import { FileDevice } from './file-device.ts'

const MIB = 1024 * 1024

async function newDevice(file: string, size: number): Promise<FileDevice> {
  fs.writeFileSync(file, Buffer.alloc(size, 5))
  return new FileDevice(await realHost.open(file, { write: true }))
}

const skip = syscalls === undefined && 'no system calls here'

test('trimmed and unmapped ranges of a file become holes, and show as such', { skip }, async (t) => {
  const file = path.join(tempFolder(t), 'disk')
  const device = await newDevice(file, 4 * MIB)
  const before = fs.statSync(file).blocks
  await device.trim(0, MIB, 0)
  await device.zero(2 * MIB, MIB, MAY_UNMAP)
  assert.ok(fs.statSync(file).blocks * 512 <= before * 512 - 2 * MIB + 64 * 1024)
  assert.deepEqual(await listExtents(device, 0, 4 * MIB), [
    { offset: 0, length: MIB, extent: HOLE | ZERO },
    { offset: MIB, length: MIB, extent: 0 },
    { offset: 2 * MIB, length: MIB, extent: HOLE | ZERO },
    { offset: 3 * MIB, length: MIB, extent: 0 },
  ])
  await device.close()
})

test('a file whose size is no multiple of a sector is a device of that size', async (t) => {
  const device = await newDevice(path.join(tempFolder(t), 'disk'), 5001)
  assert.equal(device.size, 5001)
  const last = Buffer.alloc(1)
  await device.read(5000, 1, last, 0)
  assert.equal(last[0], 5)
  await device.close()
})
