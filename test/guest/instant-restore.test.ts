// A guest boots to its prompt from a disk that is still in the repository, works there while the disk streams home, and never learns of it;
// and from a backup that is exported with an overlay, without a daemon.

import assert from 'node:assert/strict'
import fs from 'node:fs'
import { test } from 'node:test'
import { runPeer } from '../support/peer.ts'
import { MIB, Site } from '../support/site.ts'
import { guestsMissing } from './kernel.ts'
import { GuestMachine, nbdDisk } from './machine.ts'
import { makeSystemDisk } from './system-disk.ts'

const READ_ALL = 'echo 3 > /proc/sys/vm/drop_caches; md5sum /noise'

test('a guest boots to its prompt from the repository, and works on while its disk streams home', {
  skip: guestsMissing(),
}, async (t) => {
  const site = await Site.start()
  t.after(() => site.end())
  const image = site.path('vm1.raw')
  const md5 = makeSystemDisk(image, 64, 24)
  await site.done('disk', 'add', 'vm1', image, '-f', 'raw')
  const taken = await site.daemon.api.call('backup', {}, { disks: ['vm1'], repository: site.repository })
  const { details } = await site.daemon.api.follow(taken.id, () => undefined)
  const backup = String(details['backup'])
  await site.done('disk', 'remove', 'vm1')
  fs.rmSync(image)

  // So slow that the guest is up long before the disk is home.
  const terms = { name: 'vm2', repository: site.repository, backup, speed: MIB / 4 }
  const job = await site.daemon.api.call('restore', {}, terms)
  const disks = [nbdDisk('vm2', site.path('home', 'run', 'nbd', 'vm2.sock'))]
  const guest = await GuestMachine.boot({ disks, hasSystem: true })
  t.after(() => guest.kill())
  const restoring = await site.daemon.api.call('showDisk', { disk: 'vm2' }, {})
  assert.ok(restoring.restoring !== undefined, 'it boots before its disk is home')
  assert.match(await guest.say(READ_ALL), new RegExp(md5))
  await guest.say('echo written meanwhile > /note; sync')
  await site.daemon.api.call('setJobSpeed', { job: job.id }, { speed: 0 })
  const ended = await site.daemon.api.follow(job.id, () => undefined)
  assert.equal(ended.state, 'concluded', JSON.stringify(ended))

  fs.rmSync(site.repository, { recursive: true })
  assert.match(await guest.say(READ_ALL), new RegExp(md5))
  assert.match(
    await guest.say('cat /note; dmesg | grep -ciE "i/o error|ext4-fs (error|warning)"'),
    /written meanwhile\n0\n/,
  )
  await guest.say('mount -o remount,ro /')
  await guest.kill()
  const { layers } = await site.daemon.api.call('showDisk', { disk: 'vm2' }, {})
  assert.equal(layers.length, 1)
  await site.daemon.stop()
  const restored = site.path('restored.raw')
  assert.equal(runPeer('qemu-img', ['convert', '-O', 'raw', layers[0]?.path ?? '', restored]).status, 0)
  const checked = runPeer('e2fsck', ['-fn', restored])
  assert.equal(checked.status, 0, checked.stdout)
})
