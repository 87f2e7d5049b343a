// What `varve disk blockdev` prints, given to a real QEMU as it is: the guest has the disk, and a daemon that ends and comes back, cleanly
// or not, is a pause to it.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { peer } from '../support/peer.ts'
import { Site, STATUS } from '../support/site.ts'
import { journalOf, makeGuestDisk } from './journal.ts'
import { guestsMissing } from './kernel.ts'
import { GuestMachine } from './machine.ts'

/** A shell's reading of a line, word by word. */
const words = (text: string): string[] => peer('sh', '-c', `printf '%s\\n' ${text}`).trimEnd().split('\n')

test('a guest attaches by what disk blockdev prints, and waits for a daemon that is restarted or killed', {
  skip: guestsMissing(),
}, async (t) => {
  const site = await Site.start()
  t.after(() => site.end())
  const image = site.path('disk.qcow2')
  makeGuestDisk(image, 'qcow2')
  await site.done('disk', 'add', '1st', image, '-f', 'qcow2')
  const args = words((await site.done('disk', 'blockdev', '1st')).replaceAll('\n', ' '))
  assert.equal(args.length, 4)
  const guest = await GuestMachine.boot({ disks: [], args })
  t.after(() => guest.kill())
  assert.equal(await guest.run('ls /disks'), '1st\n')
  await guest.progress(3)
  for (const end of ['stop', 'kill', 'stop'] as const) {
    await site.daemon[end]()
    await site.daemon.start()
    await guest.progress(3)
  }
  await guest.check()
  const { synced } = guest
  await guest.finish()
  await site.daemon.stop()
  assert.ok(journalOf(image, 'qcow2').last >= synced)
})

test('with --json it prints what the monitor takes, with --libvirt an element, and refuses what is no disk', async (t) => {
  const site = await Site.start()
  t.after(() => site.end())
  await site.disk('vm1', '1M')
  const said = await site.done('disk', 'blockdev', 'vm1', '--json', '--device', 'virtio-scsi-pci', '--reconnect', '5')
  const socket = site.path('home', 'run', 'nbd', 'vm1.sock')
  assert.deepEqual(JSON.parse(said), {
    blockdev: {
      driver: 'nbd',
      'node-name': 'vm1',
      server: { type: 'unix', path: socket },
      export: 'vm1',
      'reconnect-delay': 5,
      discard: 'unmap',
    },
    device: { driver: 'virtio-scsi-pci', drive: 'vm1', id: 'varve-vm1', serial: 'vm1' },
  })
  const xml = await site.done('disk', 'blockdev', 'vm1', '--libvirt', '--target', 'vdb')
  assert.match(xml, /<host transport='unix' socket='.*vm1\.sock'\/>\n {4}<reconnect delay='86400'\/>/)
  await site.refuses(['disk', 'blockdev', 'vm2'], STATUS.notFound, /vm2/)
  await site.refuses(['disk', 'blockdev', 'vm1', '--reconnect', '-1'], STATUS.usage, /number of seconds/)
})
