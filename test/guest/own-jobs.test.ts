// What QEMU does with its disks itself, by Varve's commands, under the guest's writer: overlays at one moment, merges both ways, a copy; and a merge
// whose command died is gone on with.

import assert from 'node:assert/strict'
import fs from 'node:fs'
import { test } from 'node:test'
import { runPeer } from '../support/peer.ts'
import { Site, STATUS } from '../support/site.ts'
import { jobIn } from './job-in.ts'
import { assertOneMoment, journalOf, makeGuestDisk } from './journal.ts'
import { guestsMissing } from './kernel.ts'
import { fileDisk, GuestMachine } from './machine.ts'

test('the disks of a running machine are snapshot at one moment, merged down and up, and copied, and its guest loses no line', {
  skip: guestsMissing(),
}, async (t) => {
  const site = await Site.start()
  t.after(() => site.end())
  const [a, b] = [site.path('a.qcow2'), site.path('b.raw')] as const
  makeGuestDisk(a, 'qcow2')
  makeGuestDisk(b, 'raw')
  const qmp = site.path('qmp')
  const args = ['-qmp', `unix:${site.path('qmp2')},server=on,wait=off`]
  const guest = await GuestMachine.boot({ disks: [fileDisk('a', a, 'qcow2'), fileDisk('b', b, 'raw')], qmp, args })
  t.after(() => guest.kill())
  await guest.progress(3)
  await site.done('vm', 'add', 'vm', '--qmp', qmp)

  const before = guest.synced
  assert.match(
    await site.done('vm', 'snapshot', 'vm', 'monday'),
    /device-a: writes go to .*vm-device-a\.monday\.qcow2\n/,
  )
  await guest.progress(3)
  const frozen = [journalOf(a, 'qcow2'), journalOf(b, 'raw')]
  assertOneMoment(frozen)
  assert.ok(frozen.every(({ last }) => last >= before))
  await site.refuses(['vm', 'snapshot', 'vm', 'monday'], STATUS.busy, /is there already: name another/)

  // The command dies, QEMU's job waits for it, and the same command ends it.
  const first = site.begin('vm', 'commit', 'vm', 'device-a', '--speed', '1K')
  await jobIn(site.path('qmp2'), 'varve-job-commit-device-a')
  first.child.kill('SIGKILL')
  await first.ended
  assert.match(await site.done('vm', 'commit', 'vm', 'device-a'), /all of it is in .*\/a\.qcow2;/)
  await guest.progress(3)
  assert.match(await site.done('vm', 'stream', 'vm', 'device-b'), /all of it is in .*vm-device-b\.monday\.qcow2;/)
  await guest.progress(3)

  const atLeast = guest.synced
  const copy = site.path('copy.qcow2')
  assert.match(await site.done('vm', 'mirror', 'vm', 'device-b', copy), /is a copy of device-b/)
  assert.ok(journalOf(copy, 'qcow2').last >= atLeast)
  await guest.check()
  const { synced } = guest
  await guest.finish()
  fs.rmSync(b)
  fs.rmSync(site.path('vm-device-a.monday.qcow2'))
  const journals = [journalOf(a, 'qcow2'), journalOf(site.path('vm-device-b.monday.qcow2'), 'qcow2')]
  assertOneMoment(journals)
  assert.ok(journals.every(({ first: from, last }) => from === 1 && last >= synced))
  assert.equal(runPeer('qemu-img', ['check', '-q', a]).status, 0)
})
