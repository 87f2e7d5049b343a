// A disk of a running QEMU machine becomes one of Varve's and goes back into a plain file, under the guest's writer; and whoever dies in the
// middle, the guest has its old disk and every line on it.

import assert from 'node:assert/strict'
import fs from 'node:fs'
import { type TestContext, test } from 'node:test'
import { QmpClient } from '../../src/source/qemu/qmp-client.ts'
import { Site, STATUS } from '../support/site.ts'
import { jobIn } from './job-in.ts'
import { assertOneMoment, journalOf, makeGuestDisk } from './journal.ts'
import { guestsMissing } from './kernel.ts'
import { fileDisk, GuestMachine } from './machine.ts'

const SLOW = ['--speed', '256K']

interface Setting {
  readonly site: Site
  readonly guest: GuestMachine
  readonly qmp: string
}

/** A guest with a qcow2 and a raw image in QEMU's own hands, which the daemon knows as vm. */
async function setUp(t: TestContext): Promise<Setting> {
  const site = await Site.start()
  t.after(() => site.end())
  makeGuestDisk(site.path('a.qcow2'), 'qcow2')
  makeGuestDisk(site.path('b.raw'), 'raw')
  const qmp = site.path('qmp')
  const disks = [fileDisk('a', site.path('a.qcow2'), 'qcow2'), fileDisk('b', site.path('b.raw'), 'raw')]
  const args = ['-qmp', `unix:${site.path('qmp2')},server=on,wait=off`]
  const guest = await GuestMachine.boot({ disks, qmp, args })
  t.after(() => guest.kill())
  await guest.progress(3)
  await site.done('vm', 'add', 'vm', '--qmp', qmp)
  return { site, guest, qmp }
}

/** Jobs and nodes of moves that are in QEMU. */
async function movesIn(qmp: string): Promise<string[]> {
  const client = await QmpClient.open(qmp)
  const jobs = (await client.execute('query-jobs')) as readonly { readonly id: string }[]
  const nodes = (await client.execute('query-named-block-nodes')) as readonly { readonly 'node-name': string }[]
  client.close()
  return [...jobs.map(({ id }) => id), ...nodes.map((node) => node['node-name'])].filter((name) =>
    name.startsWith('varve-move-'),
  )
}

test('a disk of a running machine becomes one of Varve’s, lives through a kill of the daemon, and goes back into a file', {
  skip: guestsMissing(),
}, async (t) => {
  const { site, guest } = await setUp(t)
  const image = site.path('adopted.qcow2')
  assert.match(await site.done('vm', 'adopt', 'vm', 'device-a', image, '--as', 'a'), /device-a is Varve’s disk a now/)
  await guest.progress(3)
  const opened = fs.readdirSync(`/proc/${guest.pid}/fd`).map((fd) => fs.readlinkSync(`/proc/${guest.pid}/fd/${fd}`))
  assert.ok(!opened.includes(site.path('a.qcow2')), 'QEMU has closed the old image')
  await site.daemon.kill()
  await site.daemon.start()
  await guest.progress(3)
  await site.done('snapshot', 'create', 'a', 'while-adopted')
  await guest.check()
  const before = guest.synced

  const plain = site.path('released.raw')
  await site.done('vm', 'release', 'vm', 'device-a', plain, '-f', 'raw')
  const { layers } = await site.daemon.api.call('showDisk', { disk: 'a' }, {})
  await site.done('disk', 'remove', 'a')
  await guest.progress(3)
  await guest.check()
  const { synced } = guest
  await guest.kill()
  const journals = [journalOf(plain, 'raw'), journalOf(site.path('b.raw'), 'raw')]
  assertOneMoment(journals)
  assert.ok(journals.every(({ first, last }) => first === 1 && last >= synced))
  assert.ok(
    journalOf(layers.at(-1)?.path ?? '', 'qcow2').last >= before,
    'Varve’s disk is what it was when it was released',
  )
})

test('a command that dies while it adopts leaves the guest on its old disk, and the next one removes what it left', {
  skip: guestsMissing(),
}, async (t) => {
  const { site, guest, qmp } = await setUp(t)
  const adopting = ['vm', 'adopt', 'vm', 'device-b', site.path('b.qcow2')]
  const first = site.begin(...adopting, ...SLOW)
  await jobIn(site.path('qmp2'), 'varve-move-')
  first.child.kill('SIGKILL')
  await first.ended
  assert.notDeepEqual(await movesIn(qmp), [])
  await guest.progress(2)
  const { status: refused, stderr: said } = await site.varve(...adopting)
  assert.equal(refused, STATUS.busy, said)
  assert.match(said, /broke off had left varve-move-.*: removed\n.*there is a disk vm-device-b already/)
  assert.deepEqual(await movesIn(qmp), [])
  await site.done('disk', 'remove', 'vm-device-b')
  fs.rmSync(site.path('b.qcow2'))

  // Interrupted, it removes everything itself.
  const second = site.begin(...adopting, ...SLOW)
  await jobIn(site.path('qmp2'), 'varve-move-')
  second.child.kill('SIGTERM')
  assert.match((await second.ended).stderr, /the guest has its old disk: interrupted/)
  assert.deepEqual(await movesIn(qmp), [])
  assert.ok(!fs.existsSync(site.path('b.qcow2')))

  // And so it does when the guest's power goes.
  const third = site.begin(...adopting, ...SLOW)
  await jobIn(site.path('qmp2'), 'varve-move-')
  await guest.progress(2)
  const { synced } = guest
  await guest.kill()
  const { status, stderr } = await third.ended
  assert.equal(status, STATUS.failed, stderr)
  assert.match(stderr, /the guest has its old disk/)
  assert.ok(!fs.existsSync(site.path('b.qcow2')))
  const journals = [journalOf(site.path('a.qcow2'), 'qcow2'), journalOf(site.path('b.raw'), 'raw')]
  assertOneMoment(journals)
  assert.ok(journals.every(({ last }) => last >= synced))
})
