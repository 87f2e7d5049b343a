// A guest whose disks are in its QEMU's hands, a qcow2 and a raw one, backed up full and then by what changed while its writer runs: every backup is
// of one moment, holds every line that the guest had synced before, and leaves nothing in QEMU.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { QmpClient } from '../../src/source/qemu/qmp-client.ts'
import { Site } from '../support/site.ts'
import { assertOneMoment, journalOf, makeGuestDisk } from './journal.ts'
import { guestsMissing } from './kernel.ts'
import { fileDisk, GuestMachine } from './machine.ts'

const DISKS = [
  { name: 'a', format: 'qcow2' },
  { name: 'b', format: 'raw' },
] as const

/** Nodes that somebody named, exports and jobs. */
async function inside(socket: string): Promise<unknown> {
  const monitor = await QmpClient.open(socket)
  try {
    const nodes = (await monitor.execute('query-named-block-nodes', { flat: true })) as { 'node-name': string }[]
    return {
      count: nodes.length,
      named: nodes.map((node) => node['node-name']).filter((name) => !name.startsWith('#')),
      exports: await monitor.execute('query-block-exports'),
      jobs: await monitor.execute('query-block-jobs'),
    }
  } finally {
    monitor.close()
  }
}

test('a running guest of QEMU’s is backed up full and three times by what changed; each backup is of one moment and whole', {
  skip: guestsMissing(),
}, async (t) => {
  const site = await Site.start()
  t.after(() => site.end())
  const qmp = site.path('qmp')
  const agent = site.path('agent')
  for (const { name, format } of DISKS) makeGuestDisk(site.path(name), format)
  const disks = DISKS.map(({ name, format }) => fileDisk(name, site.path(name), format))
  const guest = await GuestMachine.boot({ disks, qmp, agent })
  t.after(() => guest.kill())
  await guest.progress(10)
  await site.done('vm', 'add', 'vm1', '--qmp', qmp)
  const before = await inside(qmp)

  const taken: { id: string; atLeast: number }[] = []
  for (const [round, kind] of ['full', 'incremental', 'incremental', 'incremental'].entries()) {
    // The last time its file systems are frozen for the moment.
    if (round === 3) {
      const hooks = { by: { kind: 'agent', socket: agent }, limitMs: 60_000 } as const
      await site.daemon.api.call('setGuestHooks', { machine: 'vm1' }, { hooks })
    }
    const atLeast = await guest.progress(5)
    const job = await site.daemon.api.call('backup', {}, { disks: ['vm1'], repository: site.repository })
    // It goes on while it is copied.
    await guest.progress(2)
    const { error, details } = await site.daemon.api.follow(job.id, () => undefined)
    assert.equal(error, undefined, error?.message)
    const kinds = (details['disks'] as { kind: string }[]).map((disk) => disk.kind)
    assert.deepEqual(kinds, [kind, kind])
    taken.push({ id: String(details['backup']), atLeast })
    assert.deepEqual(await inside(qmp), before)
  }
  await guest.check()
  await guest.finish()

  for (const { id, atLeast } of taken) {
    const journals = []
    for (const { name } of DISKS) {
      const restored = site.path(`${id}-${name}.raw`)
      await site.done('restore', `${id}:vm1.device-${name}`, '--repo', site.repository, '--to', restored, '-f', 'raw')
      const journal = journalOf(restored, 'raw')
      assert.ok(
        journal.last >= atLeast,
        `${id} holds line ${journal.last} of disk ${name}, ${atLeast} was synced before`,
      )
      journals.push(journal)
    }
    assertOneMoment(journals)
  }
})
