// Machines of libvirt's, by the command line on a real daemon, with a real libvirt and its QEMU: backups through its own checkpoints and backup job, of
// which nothing is left but one checkpoint for each repository, whoever died meanwhile.

import assert from 'node:assert/strict'
import fs from 'node:fs'
import { after, before, test } from 'node:test'
import { type DomainDisk, Libvirt, libvirtMissing } from '../support/libvirt.ts'
import { peer } from '../support/peer.ts'
import { MIB, Site, STATUS } from '../support/site.ts'

const skip = libvirtMissing()

let site: Site
let libvirt: Libvirt
const later: (() => unknown)[] = []

before(async () => {
  if (skip !== false) return
  libvirt = await Libvirt.start({ after: (work) => void later.push(work as () => unknown) })
  site = await Site.start({ args: ['--shards', '1'] })
})

after(async () => {
  if (skip !== false) return
  await site.end()
  for (const work of later.toReversed()) await work()
})

function image(target: string, name: string, format: 'raw' | 'qcow2', size = '16M', ...options: string[]): DomainDisk {
  const file = site.path(`${name}.${format}`)
  peer('qemu-img', 'create', '-q', '-f', format, ...options, file, size)
  return { target, file, format }
}

function add(name: string, ...args: string[]): Promise<string> {
  return site.done('vm', 'add', name, '--libvirt', name, '--connect', libvirt.uri, ...args)
}

/** Makes a backup; how each disk was backed up. */
async function backup(name: string, ...args: string[]): Promise<Record<string, string>> {
  const said = JSON.parse(await site.done('backup', name, '--repo', site.repository, '--json', ...args)) as {
    details: { disks: { name: string; kind: string; reason: string }[] }
  }
  return Object.fromEntries(said.details.disks.map((disk) => [disk.name, `${disk.kind}: ${disk.reason}`]))
}

async function last(): Promise<string> {
  const found = JSON.parse(await site.done('backups', '--repo', site.repository, '--json')) as { id: string }[]
  return found.at(-1)?.id ?? ''
}

async function restored(disk: string): Promise<Buffer> {
  const file = site.path(`restored-${disk}`)
  fs.rmSync(file, { force: true })
  await site.done('restore', `${await last()}:${disk}`, '--repo', site.repository, '--to', file, '-f', 'raw')
  return fs.readFileSync(file)
}

function isFilled(content: Buffer, byte: number, offset: number, length: number): boolean {
  return content.subarray(offset, offset + length).every((one) => one === byte)
}

test('a machine of libvirt’s is backed up by its checkpoints, and a disk that can have none by comparison', {
  skip,
}, async () => {
  const disks: DomainDisk[] = [
    image('vda', 'sys', 'qcow2'),
    image('vdb', 'data', 'raw'),
    image('vdc', 'old', 'qcow2', '4M', '-o', 'compat=0.10'),
    { ...image('vdd', 'iso', 'raw', '1M'), isReadOnly: true },
    { target: 'hda', format: 'raw', device: 'cdrom', isReadOnly: true },
  ]
  libvirt.domain('web', disks)
  const said = await add('web')
  assert.match(said, /^web: QEMU \d+\.\d+\S* at web of qemu\+unix:/)
  assert.match(said, /vda: qcow2, 16.0 MiB, .*sys.qcow2: incremental, over restarts of QEMU\n/)
  assert.match(said, /vdb: raw, 16.0 MiB, .*: a full by comparison each time \(raw has no place/)
  assert.match(said, /vdc: qcow2, 4.00 MiB, .*: a full by comparison each time \(version 2 of qcow2/)
  assert.match(said, /vdd: raw, .*: not backed up \(read-only\)/)
  assert.match(said, /hda: not backed up \(the drive is empty\)/)
  assert.match(await site.done('vm', 'list'), /web +running +\d\S+ +3 +web of qemu/)
  const before = libvirt.has('web')

  for (const disk of [0, 1, 2]) libvirt.io('web', disk, 'write -P 1 0 2M')
  const first = await backup('web')
  assert.match(first['web.vda'] ?? '', /^full: no earlier backup/)
  libvirt.io('web', 0, 'write -P 2 1M 64k')
  libvirt.io('web', 1, 'write -P 2 1M 64k')
  const second = await backup('web')
  assert.match(second['web.vda'] ?? '', /^incremental: changes since/)
  assert.match(second['web.vdb'] ?? '', /^full: raw has no place/)
  for (const disk of ['web.vda', 'web.vdb']) {
    const content = await restored(disk)
    assert.ok(isFilled(content, 1, 0, MIB) && isFilled(content, 2, MIB, 65_536), disk)
    assert.ok(isFilled(content, 1, MIB + 65_536, MIB - 65_536) && isFilled(content, 0, 2 * MIB, 14 * MIB), disk)
  }
  const { checkpoints, ...rest } = libvirt.has('web')
  assert.equal(checkpoints.length, 1)
  assert.ok(checkpoints[0]?.endsWith(await last()))
  assert.deepEqual({ ...rest, checkpoints: [] }, before)
  assert.deepEqual(fs.readdirSync(`${site.home}/qemu/web`), [])

  // Over a clean end of its QEMU.
  libvirt.virsh('destroy', 'web')
  assert.match(await site.done('vm', 'show', 'web'), /web: away: .*does not run: virsh -c .* start web/)
  await site.refuses(['backup', 'web', '--repo', site.repository], STATUS.failed, /does not run: virsh/)
  libvirt.virsh('start', 'web', '--paused')
  libvirt.io('web', 0, 'write -P 3 8M 1M')
  assert.match((await backup('web'))['web.vda'] ?? '', /^incremental/)
  assert.ok(isFilled(await restored('web.vda'), 3, 8 * MIB, MIB))

  // A killed QEMU has not written its bitmaps.
  await libvirt.kill('web')
  libvirt.virsh('start', 'web', '--paused')
  libvirt.io('web', 0, 'write -P 4 9M 1M')
  assert.match((await backup('web'))['web.vda'] ?? '', /^full: QEMU did not end cleanly/)
  assert.ok(isFilled(await restored('web.vda'), 4, 9 * MIB, MIB))
  assert.match((await backup('web'))['web.vda'] ?? '', /^incremental/)
  assert.equal(libvirt.has('web').checkpoints.length, 1)

  await site.done('vm', 'remove', 'web')
  assert.deepEqual(libvirt.has('web'), before)
})

test('what cannot be done with a machine of libvirt’s is refused with one line', { skip }, async () => {
  const connect = ['--connect', libvirt.uri]
  await site.refuses(
    ['vm', 'add', 'x', '--libvirt', 'none', ...connect],
    STATUS.notFound,
    /failed to get domain 'none'/,
  )
  const nowhere = `qemu+unix:///system?socket=${site.path('nowhere')}`
  await site.refuses(['vm', 'add', 'x', '--libvirt', 'x', '--connect', nowhere], STATUS.failed, /does libvirt run/)
  await site.refuses(['vm', 'add', 'x', '--libvirt', 'x', '--qmp', '/x'], STATUS.usage, /--qmp SOCKET or --libvirt/)
  await site.refuses(['vm', 'add', 'x', '--libvirt', 'x', '--agent', '/x'], STATUS.usage, /--freeze/)
  libvirt.domain('busy', [image('vda', 'busy', 'qcow2'), image('vdb', 'busy2', 'raw')])
  await site.refuses(
    ['vm', 'add', 'busy', '--libvirt', 'busy', '--freeze', ...connect],
    STATUS.failed,
    /no channel org.qemu.guest_agent.0/,
  )
  await add('busy')
  await site.refuses(['vm', 'add', 'more', '--libvirt', 'busy', ...connect], STATUS.busy, /is machine busy already/)
  await site.refuses(['vm', 'commit', 'busy', 'vda'], STATUS.failed, /libvirt’s, which would not know/)
  await site.refuses(['vm', 'snapshot', 'busy', 's'], STATUS.failed, /libvirt’s, which would not know/)

  const copy = ['blockcopy', 'busy', 'vdb', '--dest', site.path('copy'), '--transient-job', '--format', 'raw']
  libvirt.virsh(...copy)
  const command = ['backup', 'busy', '--repo', site.repository]
  await site.refuses(command, STATUS.busy, /a block job \(copy\) is at work on vdb; .*blockjob busy vdb --abort/)
  libvirt.virsh('blockjob', 'busy', 'vdb', '--abort')

  const theirs = site.path('theirs.xml')
  const server = `<server transport='unix' socket='${site.path('theirs.sock')}'/>`
  fs.writeFileSync(theirs, `<domainbackup mode='pull'>${server}</domainbackup>`)
  libvirt.virsh('backup-begin', 'busy', theirs)
  await site.refuses(command, STATUS.busy, /backed up by somebody else; .*domjobabort busy/)
  assert.match(await site.done('vm', 'show', 'busy'), /^busy: QEMU .*\n +vda: qcow2/)
  assert.ok(libvirt.has('busy').isBackedUp, 'theirs goes on')
  libvirt.virsh('domjobabort', 'busy')
  await backup('busy')
})

test('disks that are added, grown, taken out or put under an overlay are treated as what they are', {
  skip,
}, async () => {
  libvirt.domain('odd', [image('vda', 'odd-a', 'qcow2'), image('vdb', 'odd-b', 'qcow2')])
  await add('odd')
  libvirt.io('odd', 0, 'write -P 1 0 1M')
  await backup('odd')
  const added = image('vdc', 'odd-c', 'qcow2')
  libvirt.virsh('attach-disk', 'odd', added.file ?? '', 'vdc', '--subdriver', 'qcow2', '--config')
  libvirt.virsh('destroy', 'odd')
  libvirt.virsh('start', 'odd', '--paused')
  libvirt.virsh('blockresize', 'odd', 'vda', '20480K')
  libvirt.io('odd', 0, 'write -P 2 18M 1M')
  const second = await backup('odd')
  assert.match(second['odd.vda'] ?? '', /^incremental: .*; grown from 16.0 MiB to 20.0 MiB/)
  assert.match(second['odd.vdb'] ?? '', /^incremental/)
  assert.match(second['odd.vdc'] ?? '', /^full: added since the last backup/)
  const content = await restored('odd.vda')
  assert.ok(isFilled(content, 1, 0, MIB) && isFilled(content, 2, 18 * MIB, MIB) && content.length === 20 * MIB)

  libvirt.virsh('snapshot-create-as', 'odd', 'over', '--disk-only', '--no-metadata')
  libvirt.io('odd', 0, 'write -P 3 2M 1M')
  assert.match((await backup('odd'))['odd.vda'] ?? '', /^incremental/)
  assert.ok(isFilled(await restored('odd.vda'), 3, 2 * MIB, MIB))

  libvirt.virsh('destroy', 'odd')
  libvirt.virsh('detach-disk', 'odd', 'vdb', '--config')
  libvirt.virsh('start', 'odd', '--paused')
  const said = JSON.parse(await site.done('backup', 'odd', '--repo', site.repository, '--json')) as {
    details: { disks: { name: string; kind: string }[]; skipped: { name: string; reason: string }[] }
  }
  assert.deepEqual(
    said.details.disks.map(({ name, kind }) => [name, kind]),
    [
      ['odd.vda', 'incremental'],
      ['odd.vdc', 'incremental'],
    ],
  )
  assert.match(said.details.skipped[0]?.reason ?? '', /^unplugged since/)
  assert.equal(libvirt.has('odd').checkpoints.length, 1)
})

test('libvirt is asked to freeze the guest; when it cannot, the backup fails before its moment', { skip }, async () => {
  libvirt.domain('frozen', [image('vda', 'frozen', 'qcow2')], true)
  await add('frozen', '--freeze', '--freeze-limit', '5')
  const said = await site.refuses(['backup', 'frozen', '--repo', site.repository], STATUS.failed, /domfsfreeze/)
  assert.match(said, /Unable to freeze filesystems/)
  assert.deepEqual([libvirt.has('frozen').isBackedUp, libvirt.has('frozen').checkpoints.length], [false, 0])
  await site.done('machine', 'set', 'frozen', '--no-freeze')
  await backup('frozen')
})

test('a backup that was killed with Varve is made again, by what changed, and leaves nothing at libvirt', {
  skip,
}, async () => {
  libvirt.domain('killed', [image('vda', 'killed', 'qcow2')])
  await add('killed')
  libvirt.io('killed', 0, 'write -P 1 0 8M')
  await backup('killed')
  libvirt.io('killed', 0, 'write -P 2 0 8M')
  const request = { disks: ['killed'], repository: site.repository, speed: 65_536 }
  const { id } = await site.daemon.api.call('backup', {}, request)
  assert.ok(libvirt.has('killed').isBackedUp)
  await site.daemon.kill()
  libvirt.io('killed', 0, 'write -P 3 4M 4M')
  const left = libvirt.has('killed')
  assert.deepEqual([left.isBackedUp, left.checkpoints.length], [true, 2])
  await site.daemon.start()
  await site.daemon.api.call('setJobSpeed', { job: id }, { speed: 0 })
  const { error, details } = await site.daemon.api.follow(id, () => undefined)
  assert.equal(error, undefined, error?.message)
  assert.match(JSON.stringify(details['disks']), /"kind":"incremental"/)
  const content = await restored('killed.vda')
  assert.ok(isFilled(content, 2, 0, 4 * MIB) && isFilled(content, 3, 4 * MIB, 4 * MIB))
  const after = libvirt.has('killed')
  assert.deepEqual([after.isBackedUp, after.checkpoints.length], [false, 1])
})

test('a guest that overwrites more than there is scratch breaks the backup, goes on, and loses no change', {
  skip,
}, async () => {
  libvirt.domain('full', [image('vda', 'full', 'qcow2', '64M')])
  await add('full')
  libvirt.io('full', 0, 'write -P 1 0 64M')
  await backup('full')
  await site.done('host', 'set', '--scratch', '8M')
  libvirt.io('full', 0, 'write -P 2 0 32M')
  const request = { disks: ['full'], repository: site.repository, speed: 65_536 }
  const { id } = await site.daemon.api.call('backup', {}, request)
  libvirt.io('full', 0, 'write -P 3 16M 32M')
  const { error } = await site.daemon.api.follow(id, () => undefined)
  assert.match(error?.message ?? '', /took more than 8.00 MiB of scratch; the guest went on/)
  assert.deepEqual([libvirt.has('full').isBackedUp, libvirt.has('full').checkpoints.length], [false, 1])
  assert.match((await backup('full'))['full.vda'] ?? '', /^incremental/)
  const content = await restored('full.vda')
  assert.ok(isFilled(content, 2, 0, 16 * MIB) && isFilled(content, 3, 16 * MIB, 32 * MIB))
  assert.ok(isFilled(content, 1, 48 * MIB, 16 * MIB))
})
