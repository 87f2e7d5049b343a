// A disk on a file that takes seconds to answer, beside another disk of the same thread, which must not notice. The slow file is
// one of nbdkit's, mounted. Nothing is measured: while a slow request is under way the other disk does all its work.

import assert from 'node:assert/strict'
import { type ChildProcess, spawn } from 'node:child_process'
import fs from 'node:fs'
import path from 'node:path'
import { type TestContext, test } from 'node:test'
import { setTimeout as delay } from 'node:timers/promises'
import { homeAt } from '../../src/engine/home.ts'
import { SqliteCatalog } from '../../src/engine/sqlite-catalog.ts'
import { realHost } from '../../src/host/real.ts'
import { connectNbd, type NbdClient } from '../../src/nbd/client.ts'
import { Shards } from '../../src/shard/shards.ts'
import { missing } from '../support/peer.ts'
import { tempFolder } from '../support/temp.ts'

const KIB = 1024
const MIB = 1024 * KIB
const SLOW = ['rdelay=3', 'wdelay=3']

const noFuse = fs.existsSync('/dev/fuse') ? false : 'no /dev/fuse'
const skip = missing('nbdkit', 'nbdfuse') || noFuse

/** Mounts a file of zeros whose reads and writes take three seconds each, one after the other; returns how to unmount it. */
async function mountSlowFile(file: string): Promise<() => Promise<void>> {
  fs.writeFileSync(file, '')
  const command = ['nbdkit', '-s', '--filter=delay', 'memory', '64M', ...SLOW]
  const child: ChildProcess = spawn('nbdfuse', [file, '--command', ...command], { stdio: 'ignore' })
  const ended = new Promise<void>((resolve) => child.once('exit', () => resolve()))
  for (let waited = 0; fs.statSync(file).size === 0; waited += 20) {
    assert.ok(waited < 10_000 && child.exitCode === null, `nbdfuse mounts ${file}`)
    await delay(20)
  }
  return async () => {
    child.kill('SIGTERM')
    await ended
  }
}

async function openShards(folder: string): Promise<Shards> {
  const home = homeAt(path.join(folder, 'home'))
  for (const socket of [home.lock, home.nbdSocket('x'), home.viewSocket('x')])
    fs.mkdirSync(path.dirname(socket), { recursive: true })
  const openCatalog = (): SqliteCatalog => new SqliteCatalog(home.catalog)
  return Shards.open({ host: realHost, home, openCatalog, count: 1, report: () => {} })
}

async function guestOf(shards: Shards, disk: string): Promise<NbdClient> {
  const { uri } = await shards.showDisk(disk)
  assert.ok(uri !== undefined)
  return connectNbd(uri)
}

/** Registered before the folder is made: the hooks run in order, and a mounted file cannot be removed. */
function closeAfter(t: TestContext): (close: () => Promise<void>) => void {
  const all: (() => Promise<void>)[] = []
  t.after(async () => {
    for (const close of all.toReversed()) await close()
  })
  return (close) => all.push(close)
}

test('a disk on a slow file does not hold up another one of its thread', { skip }, async (t) => {
  const later = closeAfter(t)
  const folder = tempFolder(t)
  const slowFile = path.join(folder, 'slow.raw')
  later(await mountSlowFile(slowFile))
  const shards = await openShards(folder)
  later(() => shards.close())
  await shards.addDisk('slow', slowFile, 'raw')
  await shards.createDisk('quick', path.join(folder, 'quick.qcow2'), 'qcow2', 16 * MIB)
  const slow = await guestOf(shards, 'slow')
  later(() => slow.close())
  const quick = await guestOf(shards, 'quick')
  later(() => quick.close())
  const bytes = Buffer.alloc(4 * KIB, 7)
  let answered = 0
  const requests = [
    slow.read(0, bytes.length, Buffer.alloc(4 * KIB), 0),
    slow.write(64 * KIB, bytes.length, bytes, 0, 0),
  ].map((pending) => Promise.resolve(pending).then(() => answered++))
  for (let i = 0; i < 20; i++) {
    await quick.write(i * 64 * KIB, bytes.length, bytes, 0, 0)
    await quick.read(i * 64 * KIB, bytes.length, bytes, 0)
    if (i % 10 === 0) await quick.flush()
  }
  assert.equal(answered, 0, 'the quick disk is done before the slow one answers')
  await Promise.all(requests)
})
