// A daemon with a hundred disks: what it keeps in memory with an idle client of each, and that connections which come and go
// leave nothing behind. Bounds of memory, not of time.

import assert from 'node:assert/strict'
import fs from 'node:fs'
import path from 'node:path'
import { test } from 'node:test'
import { connectNbd, type NbdClient } from '../../src/nbd/client.ts'
import { startDaemon } from '../support/daemon.ts'

const GIB = 2 ** 30
const DISKS = 100
const CONNECTIONS = 1000
const AT_ONCE = 50
const MEMORY_MIB = 600
/** What a collection of garbage that has not happened yet may keep. */
const REST_MIB = 64

test('a hundred disks with a client of each fit into 600 MiB, and a thousand connections leave nothing behind', async (t) => {
  const { daemon, folder } = await startDaemon(t)
  const uris: string[] = []
  for (let index = 0; index < DISKS; index++) {
    const image = path.join(folder, `${index}.qcow2`)
    const disk = await daemon.api.call('addDisk', {}, { name: `disk${index}`, image, format: 'qcow2', size: 32 * GIB })
    assert.ok(disk.uri !== undefined)
    uris.push(disk.uri)
  }
  const guests = await connectAll(uris)
  t.after(() => closeAll(guests))
  const before = residentMiB(daemon.pid)
  assert.ok(before < MEMORY_MIB, `${before} MiB are resident`)
  for (let done = 0; done < CONNECTIONS; done += AT_ONCE)
    await closeAll(await connectAll(Array.from({ length: AT_ONCE }, (_, i) => uris[(done + i) % DISKS] as string)))
  const after = residentMiB(daemon.pid)
  assert.ok(after < before + REST_MIB, `${before} MiB were resident before, ${after} after`)
  assert.ok(after < MEMORY_MIB, `${after} MiB are resident`)
})

function connectAll(uris: readonly string[]): Promise<NbdClient[]> {
  return Promise.all(uris.map((uri) => connectNbd(uri)))
}

async function closeAll(clients: readonly NbdClient[]): Promise<void> {
  await Promise.all(clients.map((client) => client.close()))
}

function residentMiB(pid: number): number {
  const status = fs.readFileSync(`/proc/${pid}/status`, 'utf8')
  return Math.round(Number(/^VmRSS:\s+(\d+) kB$/m.exec(status)?.[1]) / 1024)
}
