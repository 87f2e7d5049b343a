// What QEMU does with its disks itself, as jobs of the daemon: they are listed, told and kept in the history; they go on when the daemon dies, are said to
// be lost when QEMU dies, and work when they are begun again.

import assert from 'node:assert/strict'
import fs from 'node:fs'
import { after, before, test } from 'node:test'
import type { JobReply } from '../../src/api/schema.ts'
import { missing, peer } from '../support/peer.ts'
import { type MachineDisk, QemuMachine } from '../support/qemu-machine.ts'
import { MIB, Site, STATUS } from '../support/site.ts'

const skip = missing('qemu-system-x86_64', 'qemu-img', 'qemu-io')
/** Bytes per second at which nothing here ends by itself. */
const SLOW = '64K'

let site: Site
const later: (() => void)[] = []

before(async () => {
  site = await Site.start({ args: ['--shards', '2'] })
})

after(async () => {
  await site.end()
  for (const work of later) work()
})

/** A machine with one disk "d" of 64 MiB in two layers, whose first 48 MiB are ones, half of them in each; taken in under its name. */
async function machineWithLayers(name: string): Promise<{ machine: QemuMachine; base: string; top: string }> {
  const [base, top] = [site.path(`${name}-base.qcow2`), site.path(`${name}-top.qcow2`)]
  peer('qemu-img', 'create', '-q', '-f', 'qcow2', base, '64M')
  peer('qemu-io', '-f', 'qcow2', '-c', 'write -P 1 0 24M', base)
  peer('qemu-img', 'create', '-q', '-f', 'qcow2', '-b', base, '-F', 'qcow2', top)
  const machine = await boot(name, top)
  await machine.io('d', 'write -P 1 24M 24M')
  // A QEMU that is killed loses what was not flushed.
  await machine.io('d', 'flush')
  await site.done('vm', 'add', name, '--qmp', machine.qmp)
  return { machine, base, top }
}

function boot(name: string, file: string): Promise<QemuMachine> {
  const disk: MachineDisk = { id: 'd', file, format: 'qcow2' }
  const second = ['-qmp', `unix:${site.path(`${name}.second`)},server=on,wait=off`]
  return QemuMachine.start({ after: (work) => void later.push(work as () => void) }, [disk], {
    qmp: site.path(`${name}.qmp`),
    args: second,
  })
}

/** Begins a slow job, and waits until it copies. */
async function begun(...args: string[]): Promise<string> {
  const { id } = JSON.parse(await site.done('vm', ...args, '--speed', SLOW, '--no-wait', '--json')) as JobReply
  await site.job(id, ({ done }) => done > 0)
  return id
}

async function ended(id: string): Promise<JobReply> {
  return site.daemon.api.follow(id, () => undefined)
}

test('a merge is a job: it is listed, goes on when the daemon was killed, and is in the history', {
  skip,
}, async () => {
  const { base, machine } = await machineWithLayers('merged')
  const id = await begun('commit', 'merged', 'd')
  assert.match(id, /^vm-commit-/)
  assert.match(await site.done('job', 'list'), new RegExp(`${id} +merged +running`))
  assert.match(await site.done('vm', 'show', 'merged'), new RegExp(`away: job ${id} has the monitor`))
  await site.refuses(['vm', 'stream', 'merged', 'd'], STATUS.busy, new RegExp(`job ${id} is at work on machine merged`))
  await site.refuses(['vm', 'remove', 'merged'], STATUS.busy, new RegExp(`job ${id} is at work`))
  await site.refuses(['backup', 'merged', '--repo', site.repository], STATUS.busy, /has the monitor of machine merged/)
  await site.done('job', 'pause', id)
  await site.job(id, ({ state }) => state === 'paused')
  await site.done('job', 'resume', id)

  await site.daemon.kill()
  await site.daemon.start()
  await site.job(id, ({ state, done }) => state === 'running' && done > 0)
  // The same command again follows it.
  assert.match(await site.done('vm', 'commit', 'merged', 'd'), /all of it is in .*merged-base\.qcow2; give QEMU that/)
  const { state, error, details } = await ended(id)
  assert.deepEqual([state, error, details['image'], details['disk']], ['concluded', undefined, base, 'd'])
  assert.match(await site.done('job', 'list', '--history'), new RegExp(`${id} +merged +concluded`))
  assert.deepEqual(await machine.ask('query-jobs'), [])
  peer('qemu-io', '-U', '-r', '-f', 'qcow2', '-c', 'read -P 1 0 48M', base)
  assert.match(await site.done('vm', 'show', 'merged'), /d: qcow2, 64.0 MiB, .*merged-base/)
})

test('a merge that is cancelled leaves the machine as it was, and a copy leaves no image', { skip }, async () => {
  const { machine, top } = await machineWithLayers('cancelled')
  const stream = await begun('stream', 'cancelled', 'd')
  await site.done('job', 'cancel', stream)
  assert.equal((await ended(stream)).error?.kind, 'cancelled')
  const image = site.path('copy.qcow2')
  const mirror = await begun('mirror', 'cancelled', 'd', image)
  await site.refuses(['vm', 'mirror', 'cancelled', 'd', image], STATUS.busy, /is at work on machine cancelled/)
  await site.done('job', 'cancel', mirror)
  assert.equal((await ended(mirror)).error?.kind, 'cancelled')
  assert.equal(fs.existsSync(image), false)
  assert.deepEqual(await machine.ask('query-jobs'), [])
  assert.match(await site.done('vm', 'show', 'cancelled'), new RegExp(`d: qcow2, 64.0 MiB, ${top}`))
})

test('a copy that the daemon’s end broke off is gone on with, and is whole', { skip }, async () => {
  const { machine } = await machineWithLayers('copied')
  const image = site.path('whole.qcow2')
  const id = await begun('mirror', 'copied', 'd', image)
  await site.daemon.stop()
  await site.daemon.start()
  await site.job(id, ({ state, done }) => state === 'running' && done > 0)
  await site.done('job', 'set-speed', id, '0')
  assert.equal((await ended(id)).error, undefined)
  assert.deepEqual(await machine.ask('query-jobs'), [])
  peer('qemu-io', '-r', '-f', 'qcow2', '-c', `read -P 1 0 ${48 * MIB}`, '-c', 'read -P 0 48M 16M', image)
})

test('a merge whose QEMU was killed has lost nothing, says what to do, and works when it is begun again', {
  skip,
}, async () => {
  const { machine, base, top } = await machineWithLayers('lost')
  const id = await begun('commit', 'lost', 'd')
  await machine.stop('kill')
  const { error } = await ended(id)
  assert.match(
    error?.message ?? '',
    /nothing is lost: start the machine with the layers it had, .*varve vm commit lost d/,
  )
  assert.match(await site.done('job', 'list'), new RegExp(`${id} +lost .*nothing is lost`))
  await boot('lost', top)
  assert.match(await site.done('vm', 'commit', 'lost', 'd'), /all of it is in .*lost-base\.qcow2/)
  peer('qemu-io', '-U', '-r', '-f', 'qcow2', '-c', 'read -P 1 0 48M', base)
})
