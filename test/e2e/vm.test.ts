// Machines in QEMUs of their own, by the command line on a real daemon and a real QEMU: what is said of their disks, and backups of all disks at
// one moment while the guest's device writes, which leave nothing in QEMU.

import assert from 'node:assert/strict'
import fs from 'node:fs'
import path from 'node:path'
import { after, before, type TestContext, test } from 'node:test'
import { checkImage } from '../support/daemon.ts'
import { missing, peer } from '../support/peer.ts'
import { type MachineDisk, QemuMachine } from '../support/qemu-machine.ts'
import { Site, STATUS } from '../support/site.ts'

const skip = missing('qemu-system-x86_64', 'qemu-img', 'qemu-io')

let site: Site
const later: (() => void)[] = []
/** What ends with the file, not with one of its tests. */
const whole: Pick<TestContext, 'after'> = { after: (work) => void later.push(work as () => void) }

before(async () => {
  site = await Site.start({ args: ['--shards', '2'] })
})

after(async () => {
  await site.end()
  for (const work of later) work()
})

function image(name: string, format: 'raw' | 'qcow2', size = '32M', ...options: string[]): MachineDisk {
  const file = site.path(`${name}.${format}`)
  peer('qemu-img', 'create', '-q', '-f', format, ...options, file, size)
  return { id: name, file, format }
}

interface Left {
  readonly nodes: string[]
  readonly exports: unknown[]
  readonly jobs: unknown[]
}

/** What a machine has of nodes, exports and jobs. */
async function has(machine: QemuMachine): Promise<Left> {
  const nodes = (await machine.ask('query-named-block-nodes', { flat: true })) as { 'node-name': string }[]
  return {
    nodes: nodes.map((node) => node['node-name']).toSorted(),
    exports: (await machine.ask('query-block-exports')) as unknown[],
    jobs: (await machine.ask('query-block-jobs')) as unknown[],
  }
}

async function bitmapsOf(machine: QemuMachine, disk: string): Promise<string[]> {
  const nodes = (await machine.ask('query-named-block-nodes', { flat: true })) as {
    'node-name': string
    'dirty-bitmaps'?: { name: string }[]
  }[]
  return nodes.find((node) => node['node-name'] === `node-${disk}`)?.['dirty-bitmaps']?.map(({ name }) => name) ?? []
}

/** The ids in the repository, oldest first. */
async function backups(): Promise<string[]> {
  const found = JSON.parse(await site.done('backups', '--repo', site.repository, '--json')) as { id: string }[]
  return found.map(({ id }) => id)
}

async function restored(backup: string, disk: string): Promise<Buffer> {
  const file = site.path(`restored-${Math.random().toString(36).slice(2)}`)
  await site.done('restore', `${backup}:${disk}`, '--repo', site.repository, '--to', file, '-f', 'raw')
  const content = fs.readFileSync(file)
  fs.rmSync(file)
  return content
}

/** Whether a range is all of one byte. */
function isFilled(content: Buffer, byte: number, offset: number, length: number): boolean {
  return content.subarray(offset, offset + length).every((one) => one === byte)
}

test('a machine is taken in, shown, listed and forgotten; each disk has a line that says what can be done', {
  skip,
}, async () => {
  const disks = [
    image('root', 'qcow2'),
    image('old', 'qcow2', '8M', '-o', 'compat=0.10'),
    image('data', 'raw'),
    { ...image('iso', 'raw', '1M'), readOnly: true },
  ]
  const machine = await QemuMachine.start(whole, disks, {
    qmp: site.path('show.qmp'),
    args: ['-device', 'ide-cd,id=cd'],
  })
  const said = await site.done('vm', 'add', 'show', '--qmp', machine.qmp)
  assert.match(said, /show: QEMU \d+\.\d+/)
  assert.match(said, /root: qcow2, 32.0 MiB, .*: incremental, over restarts of QEMU\n/)
  assert.match(said, /old: qcow2, 8.00 MiB, .*: incremental as long as QEMU runs \(version 2 of qcow2/)
  assert.match(said, /data: raw, 32.0 MiB, .*: incremental as long as QEMU runs \(raw has no place/)
  assert.match(said, /iso: raw, 1.00 MiB, .*: not backed up \(read-only\)/)
  assert.match(said, /cd: not backed up \(the drive is empty\)/)
  assert.match(await site.done('vm', 'list'), /show +running +\d+\.\d+\.\d+ +3 +\S+show.qmp/)
  assert.equal(await site.done('machine', 'list'), 'MACHINE  DISKS')
  await machine.stop()
  assert.match(await site.done('vm', 'show', 'show'), /show: away: nobody listens/)
  assert.match(await site.done('vm', 'list'), /show +away/)
  assert.match(await site.done('vm', 'remove', 'show'), /show removed/)
  assert.equal(await site.done('vm', 'list'), 'VM  STATE  QEMU  DISKS  MONITOR')
})

test('what cannot be a machine’s monitor or name is refused with one line', { skip }, async () => {
  const machine = await QemuMachine.start(whole, [], { qmp: site.path('bad.qmp') })
  const none = site.path('none')
  await site.refuses(['vm', 'add', 'x', '--qmp', none], STATUS.notFound, /nobody listens at .*none/)
  fs.writeFileSync(site.path('file'), '')
  await site.refuses(['vm', 'add', 'x', '--qmp', site.path('file')], STATUS.notFound, /nobody listens/)
  await site.refuses(['vm', 'add', 'x'], STATUS.usage, /--qmp/)
  await site.refuses(['vm', 'add', '-x', '--qmp', none], STATUS.usage, /./)
  await site.refuses(['vm', 'add', 'a b', '--qmp', none], STATUS.usage, /machine name/)
  // A server that waits for its client to speak, as a guest agent does.
  await site.refuses(['vm', 'add', 'x', '--qmp', `${site.home}/run/api.sock`], STATUS.failed, /says nothing: /)
  await site.refuses(['vm', 'show', 'x'], STATUS.notFound, /varve vm list/)
  await site.refuses(['vm', 'remove', 'x'], STATUS.notFound, /varve vm list/)
  await site.done('vm', 'add', 'bad', '--qmp', machine.qmp)
  await site.refuses(['vm', 'add', 'bad', '--qmp', none], STATUS.busy, /already/)
  await site.refuses(['vm', 'add', 'other', '--qmp', machine.qmp], STATUS.busy, /monitor of machine bad already/)
  await site.refuses(
    ['disk', 'create', 'bad', none, '-f', 'raw', '--size', '1M'],
    STATUS.busy,
    /there is a machine bad/,
  )
  await site.refuses(['machine', 'show', 'bad'], STATUS.notFound, /varve vm show bad/)
  await site.refuses(['snapshot', 'create', 'bad', 's'], STATUS.failed, /a snapshot is for disks of Varve's/)
  await site.refuses(['view', 'open', 'bad'], STATUS.failed, /a view is for disks of Varve's/)
  await site.refuses(['backup', 'bad', '--repo', site.repository], STATUS.usage, /no disk to back up/)
  await site.done('vm', 'remove', 'bad')
})

test('a machine is backed up full, then by what changed, at one moment, and nothing is left in QEMU', {
  skip,
}, async () => {
  const disks = [image('sys', 'qcow2'), image('var', 'raw', '16M')]
  const machine = await QemuMachine.start(whole, disks, { qmp: site.path('web.qmp') })
  await site.done('vm', 'add', 'web', '--qmp', machine.qmp)
  const before = await has(machine)
  await machine.io('sys', 'write -P 1 0 1M')
  await machine.io('var', 'write -P 2 0 1M')
  const first = await site.done('backup', 'web', '--repo', site.repository)
  assert.match(first, /web\.sys: full \(no earlier backup/)
  assert.match(first, /web\.var: full \(no earlier backup/)
  assert.deepEqual(await has(machine), before)
  await machine.io('sys', 'write -P 3 64k 4k')
  await machine.io('var', 'write -P 4 8M 12k')
  const second = await site.done('backup', 'web', '--repo', site.repository)
  assert.match(second, /web\.sys: incremental \(changes since /)
  assert.match(second, /web\.var: incremental \(changes since .*\nread 16.0 KiB/)
  assert.deepEqual(await has(machine), before)
  const [one, two] = (await backups()) as [string, string]
  assert.deepEqual(await bitmapsOf(machine, 'sys'), [`varve-web-${await repositoryId()}-${two}`])
  assert.ok(isFilled(await restored(one, 'web.sys'), 1, 0, 2 ** 20))
  const sys = await restored(two, 'web.sys')
  assert.ok(isFilled(sys, 3, 65_536, 4096) && isFilled(sys, 1, 0, 65_536) && isFilled(sys, 1, 69_632, 2 ** 20 - 69_632))
  const data = await restored(two, 'web.var')
  assert.ok(isFilled(data, 4, 8 * 2 ** 20, 12_288) && isFilled(data, 2, 0, 2 ** 20))
  assert.match(await site.done('backup', '--all', '--repo', site.repository), /web: incremental .*read 0 B/)
  // The bitmaps go with the machine.
  await site.done('vm', 'remove', 'web')
  assert.deepEqual(await bitmapsOf(machine, 'sys'), [])
})

test('each disk gets its treatment, and a line that says which', { skip }, async () => {
  const sys = image('t-sys', 'qcow2', '8M')
  const data = image('t-data', 'raw', '8M')
  const old = image('t-old', 'qcow2', '4M', '-o', 'compat=0.10')
  const iso = { ...image('t-iso', 'raw', '1M'), readOnly: true }
  const options = { qmp: site.path('t.qmp'), args: ['-device', 'ide-cd,id=t-cd'] }
  const machine = await QemuMachine.start(whole, [sys, data, old, iso], options)
  await site.done('vm', 'add', 't', '--qmp', machine.qmp)
  for (const { id } of [sys, data, old]) await machine.io(id, 'write -P 1 0 2M')
  const first = await site.done('backup', 't', '--repo', site.repository)
  for (const { id } of [sys, data, old]) assert.match(first, new RegExp(`t\\.${id}: full \\(no earlier backup`))
  assert.match(first, /t\.t-iso: not in it \(read-only\)\nt\.t-cd: not in it \(the drive is empty\)/)

  await machine.ask('block_resize', { 'node-name': 'node-t-sys', size: 12 * 2 ** 20 })
  await machine.io('t-sys', 'write -P 7 11M 4k')
  const second = await site.done('backup', 't', '--repo', site.repository)
  assert.match(second, /t\.t-sys: incremental \(changes since .*; grown from 8.00 MiB to 12.0 MiB\)/)
  assert.match(second, /t\.t-data: incremental/)
  assert.match(second, /t\.t-old: incremental/)

  await machine.io('t-sys', 'write -P 2 0 4k')
  await machine.stop('quit')
  const again = await QemuMachine.start(whole, [sys, data, image('t-more', 'qcow2', '4M')], options)
  await again.io('t-data', 'write -P 3 64k 8k')
  const third = await site.done('backup', 't', '--repo', site.repository)
  assert.match(third, /t\.t-sys: incremental \(changes since [^;]*\)/)
  assert.match(
    third,
    /t\.t-data: full by comparison with .* \(QEMU was started again, and raw has no place for a bitmap\)/,
  )
  assert.match(third, /t\.t-more: full \(added since the last backup\)/)
  assert.match(third, /t\.t-old: not in it \(unplugged since /)

  await again.io('t-sys', 'write -P 4 1M 4k')
  await again.stop()
  const killed = await QemuMachine.start(whole, [sys, data], options)
  const fourth = await site.done('backup', 't', '--repo', site.repository)
  // Its bitmap was never in the image; the next one is, and is left there as in use.
  assert.match(
    fourth,
    /t\.t-sys: full by comparison with .* \(its image has no bitmap of an earlier backup: QEMU did not/,
  )
  await killed.stop('quit')
  await (await QemuMachine.start(whole, [sys, data], options)).stop()
  const last = await QemuMachine.start(whole, [sys, data], options)
  const fifth = await site.done('backup', 't', '--repo', site.repository)
  assert.match(fifth, /t\.t-sys: full by comparison with .* \(QEMU did not end cleanly, and its bitmap is inconsistent/)
  const newest = (await backups()).at(-1) as string
  const content = await restored(newest, 't.t-sys')
  assert.ok(
    isFilled(content, 2, 0, 4096) && isFilled(content, 4, 2 ** 20, 4096) && isFilled(content, 7, 11 * 2 ** 20, 4096),
  )
  assert.ok(isFilled(await restored(newest, 't.t-data'), 3, 65_536, 8192))
  assert.match(
    await site.done('backup', 't', '--repo', site.repository),
    /t\.t-sys: incremental .*\nt\.t-data: incremental/,
  )
  await last.stop('quit')
  // A kill leaves clusters that nobody uses; corrupt it does not.
  assert.equal(checkImage(sys.file)?.corruptions, 0)
  await site.done('vm', 'remove', 't')
})

test('a machine whose NBD server somebody else uses is not backed up until that has ended, and nothing is left in it', {
  skip,
}, async () => {
  const machine = await QemuMachine.start(whole, [image('n-one', 'qcow2')], { qmp: site.path('n.qmp') })
  await site.done('vm', 'add', 'n', '--qmp', machine.qmp)
  const before = await has(machine)
  await machine.ask('nbd-server-start', { addr: { type: 'unix', data: { path: site.path('other.nbd') } } })
  await site.refuses(['backup', 'n', '--repo', site.repository], STATUS.busy, /one NBD server.*nbd-server-stop/)
  assert.deepEqual(await has(machine), before)
  await machine.ask('nbd-server-stop')
  assert.match(await site.done('backup', 'n', '--repo', site.repository), /n\.n-one: full/)
})

test('when scratch is full the backup fails and the guest goes on, and no change is lost', { skip }, async () => {
  const disks = [image('s-one', 'qcow2', '64M'), image('s-two', 'raw', '8M')]
  const machine = await QemuMachine.start(whole, disks, { qmp: site.path('s.qmp') })
  await site.done('vm', 'add', 's', '--qmp', machine.qmp)
  await machine.io('s-one', 'write -P 1 0 32M')
  await site.done('backup', 's', '--repo', site.repository)
  const before = await has(machine)
  await machine.io('s-one', 'write -P 2 0 32M')
  await machine.io('s-two', 'write -P 2 0 1M')
  await site.done('host', 'set', '--scratch', '8M')
  const args = ['backup', 's', '--repo', site.repository, '--speed', '256K', '--no-wait', '--json']
  const { id } = JSON.parse(await site.done(...args)) as { id: string }
  // More than scratch holds, and all of it before the backup comes to its end.
  await machine.io('s-one', 'write -P 3 0 32M')
  const ended = await site.daemon.api.follow(id, () => undefined)
  assert.equal(ended.error?.kind, 'no-space', ended.error?.message)
  assert.match(ended.error?.message ?? '', /the moment of machine s is broken: its scratch of .* is full/)
  assert.deepEqual(await has(machine), before)
  await machine.io('s-one', 'read -P 3 0 32M')
  const again = await site.done('backup', 's', '--repo', site.repository)
  assert.match(again, /s\.s-one: incremental .*\ns\.s-two: incremental .*\nread 33.0 MiB/)
  const last = (await backups()).at(-1) as string
  assert.ok(isFilled(await restored(last, 's.s-one'), 3, 0, 32 * 2 ** 20))
  assert.ok(isFilled(await restored(last, 's.s-two'), 2, 0, 2 ** 20))
  const { scratch } = await site.daemon.api.call('showHost', {}, {})
  assert.equal(scratch.used, 0)
  await site.done('host', 'set', '--scratch', 'default')
})

test('while a backup is copied it shows its moment, whatever the guest writes, and the monitor is anybody’s', {
  skip,
}, async () => {
  const disks = [image('m-one', 'qcow2', '8M'), image('m-two', 'raw', '8M')]
  const machine = await QemuMachine.start(whole, disks, { qmp: site.path('m.qmp') })
  await site.done('vm', 'add', 'm', '--qmp', machine.qmp)
  for (const { id } of disks) await machine.io(id, 'write -P 1 0 8M')
  const args = ['backup', 'm', '--repo', site.repository, '--speed', '256K', '--no-wait', '--json']
  const { id } = JSON.parse(await site.done(...args)) as { id: string }
  // One after the other, after the moment: neither is in it.
  for (const disk of disks) await machine.io(disk.id, 'write -P 2 0 8M')
  await site.refuses(['vm', 'remove', 'm'], STATUS.busy, /is at work on machine m/)
  assert.match(await site.done('vm', 'show', 'm'), /m: QEMU/)
  await site.daemon.api.call('setJobSpeed', { job: id }, { speed: 0 })
  assert.equal((await site.daemon.api.follow(id, () => undefined)).error, undefined)
  const last = (await backups()).at(-1) as string
  for (const disk of disks) assert.ok(isFilled(await restored(last, `m.${disk.id}`), 1, 0, 8 * 2 ** 20), disk.id)
  await site.done('backup', 'm', '--repo', site.repository)
  const next = (await backups()).at(-1) as string
  for (const disk of disks) assert.ok(isFilled(await restored(next, `m.${disk.id}`), 2, 0, 8 * 2 ** 20), disk.id)
})

async function repositoryId(): Promise<string> {
  const config = fs.readFileSync(path.join(site.repository, 'config'))
  const id = /"id":"([0-9a-f]{8})/.exec(config.toString('latin1'))?.[1]
  assert.ok(id !== undefined)
  return id
}
