// varve bitmap on a real daemon: each command, what NBD's clients see of it, and a restart.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { missing, peer } from '../support/peer.ts'
import { MIB, Site, STATUS } from '../support/site.ts'

test('bitmaps are kept by commands, seen over NBD, and survive a death of the daemon', {
  skip: missing('nbdinfo'),
}, async (t) => {
  const site = await Site.start()
  t.after(() => site.end())
  await site.disk('vm1', '8M')
  const write = async (at: number): Promise<void> => {
    const guest = await site.guest('vm1')
    await guest.write(at * MIB, MIB, Buffer.alloc(MIB, 7), 0, 0)
    await guest.close()
  }
  const list = async (): Promise<unknown[]> => {
    const rows = JSON.parse(await site.done('bitmap', 'list', 'vm1', '--json')) as Record<string, unknown>[]
    return rows.map(({ name, granule, dirtyBytes, recording }) => [name, granule, Number(dirtyBytes) / MIB, recording])
  }
  await site.done('bitmap', 'add', 'vm1', 'first')
  await write(0)
  await site.done('bitmap', 'add', 'vm1', 'second', '--granule', '64K', '--from', 'first')
  await site.done('bitmap', 'disable', 'vm1', 'first')
  await write(2)
  await site.daemon.kill()
  await site.daemon.start()
  assert.deepEqual(await list(), [
    ['first', 4096, 1, false],
    ['second', 65_536, 2, true],
  ])
  await site.done('bitmap', 'rename', 'vm1', 'first', 'monday')
  const { status, stdout } = await site.begin('bitmap', 'compare', 'vm1', 'monday', 'second').ended
  assert.equal(status, STATUS.failed)
  assert.match(stdout, /both +1\.00 MiB\nmonday only +0 B\nsecond only +1\.00 MiB/)
  const uri = `nbd+unix:///vm1?socket=${site.path('home', 'run', 'nbd', 'vm1.sock')}`
  const map = peer('nbdinfo', '--map=qemu:dirty-bitmap:second', uri)
  assert.match(map, /^ *0 +1048576 +1 .*\n *1048576 +1048576 +0 .*\n *2097152 +1048576 +1 /)
  await site.done('bitmap', 'merge', 'vm1', 'second', 'monday')
  await site.done('bitmap', 'compare', 'vm1', 'monday', 'second')
  await site.done('bitmap', 'clear', 'vm1', 'second')
  await site.done('bitmap', 'enable', 'vm1', 'monday')
  await write(4)
  assert.deepEqual(await list(), [
    ['second', 65_536, 1, true],
    ['monday', 4096, 3, true],
  ])
  await site.done('bitmap', 'remove', 'vm1', 'second')
  await site.refuses(['bitmap', 'clear', 'vm1', 'second'], STATUS.notFound, /no bitmap "second"/)
  await site.refuses(['bitmap', 'add', 'vm1', 'odd', '-g', '3000'], STATUS.usage, /power of two/)
  await site.refuses(['bitmap', 'list', 'none'], STATUS.notFound, /there is no disk none/)
})
