// Disks whose data are in an external file, through the daemon: served, snapshot, merged, killed and served again, and in the end what
// QEMU reads, and a raw data file holds, is what the guest wrote.

import assert from 'node:assert/strict'
import fs from 'node:fs'
import { test } from 'node:test'
import { missing, peer } from '../support/peer.ts'
import { MIB, Site } from '../support/site.ts'

const SIZE = 8 * MIB

for (const [name, options] of [
  ['plain', ''],
  ['raw', ',data_file_raw=on'],
  ['fine', ',extended_l2=on'],
] as const) {
  test(`a disk with a data file is snapshot and merged like any other: ${name}`, {
    skip: missing('qemu-img'),
  }, async (t) => {
    const site = await Site.start()
    t.after(() => site.end())
    const data = site.path(`${name}.data`)
    const image = site.image(`${name}.qcow2`, '8M', '-o', `data_file=${data}${options}`)
    await site.done('disk', 'add', 'vm1', image, '-f', 'qcow2')
    const guest = await site.guest('vm1')
    const write = async (offset: number, length: number, byte: number): Promise<void> => {
      await guest.write(offset, length, Buffer.alloc(length, byte), 0, 0)
    }
    await write(4096, 65_536, 1)
    await site.done('snapshot', 'create', 'vm1', 's1')
    const frozen = fs.readFileSync(data)
    await write(8192, 65_536, 2)
    await guest.zero(4096, 512, 0)
    assert.ok(fs.readFileSync(data).equals(frozen), 'a frozen layer is left alone')
    await site.done('commit', 'vm1', '--yes')
    await write(MIB, 512, 3)
    await guest.close()

    await site.daemon.kill()
    await site.daemon.start()
    const expected = Buffer.alloc(SIZE)
    expected
      .fill(1, 4096 + 512, 8192)
      .fill(2, 8192, 8192 + 65_536)
      .fill(3, MIB, MIB + 512)
    const again = await site.guest('vm1')
    const seen = Buffer.alloc(SIZE)
    await again.read(0, SIZE, seen, 0)
    await again.close()
    assert.ok(seen.equals(expected))
    await site.daemon.stop()
    peer('qemu-img', 'check', '-f', 'qcow2', image)
    peer('qemu-img', 'convert', '-f', 'qcow2', '-O', 'raw', image, site.path('content'))
    assert.ok(fs.readFileSync(site.path('content')).equals(expected))
    if (name === 'raw') assert.ok(fs.readFileSync(data).subarray(0, SIZE).equals(expected))
  })
}
