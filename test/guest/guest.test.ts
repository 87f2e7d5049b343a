// A real guest on a Varve disk, through snapshot, backup, commit and kill -9 of the daemon: it sees a pause and no error, every
// line that it synced is there, in the disk and in each backup taken after it, and the file systems are clean.

import assert from 'node:assert/strict'
import fs from 'node:fs'
import path from 'node:path'
import { test } from 'node:test'
import { ChildDaemon } from '../../src/cli/demo/child-daemon.ts'
import { restoreToImage } from '../../src/cli/restore-image.ts'
import { initRepositoryAt, openRepositoryAt } from '../../src/shard/repositories.ts'
import { missing, peer, runPeer } from '../support/peer.ts'
import { tempFolder } from '../support/temp.ts'
import { findKernel, GuestMachine, makeInitramfs } from './machine.ts'

const kernel = findKernel()
const absent =
  missing('qemu-system-x86_64', 'qemu-img', 'mke2fs', 'e2fsck', 'debugfs', 'busybox') ||
  (kernel === undefined ? 'linux-image-cloud-amd64 not installed' : false)

const ROUNDS = 3
const LINES = 100_000

/** Checks an ext4 image and returns the lines in its journal; the guest had it mounted, so its own journal is replayed first. */
function readJournal(image: string): number {
  // 0: clean; 1: the file system's journal was replayed.
  const checked = runPeer('e2fsck', ['-fp', image])
  assert.ok(checked.status <= 1, `e2fsck: ${checked.stdout}${checked.stderr}`)
  assert.equal(runPeer('e2fsck', ['-fn', image]).status, 0)
  const lines = peer('debugfs', '-R', 'cat /journal', image).split('\n').slice(0, -1)
  lines.forEach((line, index) => assert.equal(line, `line ${index + 1} of the guest's journal`))
  return lines.length
}

test('a guest lives through snapshots, backups, merges and a killed daemon, and loses no line that it synced', {
  skip: absent,
  timeout: 600_000,
}, async (t) => {
  assert.ok(kernel !== undefined)
  const folder = tempFolder(t)
  const raw = path.join(folder, 'disk.raw')
  const image = path.join(folder, 'disk.qcow2')
  const repository = path.join(folder, 'repository')
  const initramfs = path.join(folder, 'initramfs')
  peer('qemu-img', 'create', '-q', '-f', 'raw', raw, '128M')
  peer('mke2fs', '-q', '-F', '-t', 'ext4', raw)
  peer('qemu-img', 'convert', '-O', 'qcow2', raw, image)
  makeInitramfs(initramfs, kernel.modules, LINES)
  await (await initRepositoryAt(repository)).close()

  const daemon = new ChildDaemon(path.join(folder, 'home'), path.join(folder, 'daemon.log'))
  t.after(() => daemon.kill())
  await daemon.start()
  await daemon.api.call('addDisk', {}, { name: 'vm1', image, format: 'qcow2' })
  const guest = await GuestMachine.boot(kernel.image, initramfs, path.join(folder, 'home/run/nbd/vm1.sock'), 'vm1')
  t.after(() => guest.kill())
  await guest.progress(5)

  const backups: { id: string; atLeast: number }[] = []
  const takeBackup = async (): Promise<void> => {
    const atLeast = guest.synced
    const job = await daemon.api.call('backup', {}, { disks: ['vm1'], repository })
    const ended = await daemon.api.follow(job.id, () => undefined)
    assert.equal(ended.error, undefined)
    backups.push({ id: String(ended.details['backup']), atLeast })
  }
  await takeBackup()
  for (let round = 1; round <= ROUNDS; round++) {
    await daemon.api.call('createSnapshot', { disk: 'vm1' }, { name: `round-${round}` })
    await guest.progress(10)
    await takeBackup()
    const commit = await daemon.api.call('commit', { disk: 'vm1' }, { speed: 512 * 1024 })
    await guest.progress(3)
    await daemon.kill()
    await daemon.start()
    await daemon.api.call('setJobSpeed', { job: commit.id }, { speed: 0 }).catch(() => undefined)
    const deadline = performance.now() + 60_000
    while ((await daemon.api.call('showJob', { job: commit.id }, {})).endedMs === undefined) {
      assert.ok(performance.now() < deadline, 'the commit ends')
      await new Promise((resolve) => setTimeout(resolve, 50))
    }
    assert.equal((await daemon.api.call('showDisk', { disk: 'vm1' }, {})).layers.length, 1)
    await guest.progress(5)
    await takeBackup()
  }
  const synced = guest.synced
  assert.ok(!/i\/o error|ext4-fs error|mount failed|kernel complained/i.test(guest.console), guest.console)
  guest.kill()
  await guest.ended()
  await daemon.stop()

  assert.equal(runPeer('qemu-img', ['check', '-q', image]).status, 0)
  const final = path.join(folder, 'final.raw')
  peer('qemu-img', 'convert', '-O', 'raw', image, final)
  assert.ok(readJournal(final) >= synced, 'every synced line is in the disk')
  const opened = await openRepositoryAt(repository)
  for (const { id, atLeast } of backups) {
    const reader = await opened.openBackup(id)
    const restored = path.join(folder, `${id}.raw`)
    const device = reader.disks[0]?.device
    assert.ok(device !== undefined)
    await restoreToImage(device, restored, 'raw', () => undefined)
    await reader.close()
    const lines = readJournal(restored)
    assert.ok(lines >= atLeast, `backup ${id} has ${lines} lines; ${atLeast} were synced before it`)
    fs.rmSync(restored)
  }
  await opened.close()
  t.diagnostic(`${synced} lines, ${backups.length} backups, ${ROUNDS} kills`)
})
