// Clients that back up and forget, and one that prunes, each a process of its own, in one repository for some minutes; then every backup is
// verified, and compared with what its client wrote. Prints a line of figures; status 1 when something is not as it was.
//
//   node test/fault/run-traffic.ts [--minutes N] [--clients N] [--folder FOLDER]

import assert from 'node:assert/strict'
import { type ChildProcess, fork } from 'node:child_process'
import crypto from 'node:crypto'
import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { parseArgs } from 'node:util'
import { Random } from '../../src/base/random.ts'
import { isBlockError } from '../../src/block/error.ts'
import { realHost } from '../../src/host/real.ts'
import { openRepository, type Repository } from '../../src/repository/repository.ts'
import { DirectoryStore } from '../../src/repository/stores/directory.ts'
import { changeSome, initInline, inline, noise, restore } from '../support/backups.ts'

const SIZE = 4 * 1024 * 1024

interface Task {
  readonly role: 'client' | 'pruner'
  readonly folder: string
  readonly seed: number
  readonly minutes: number
}

interface Done {
  readonly backups: number
  readonly forgotten: number
  readonly prunings: number
  readonly removedPacks: number
  readonly waits: number
}

const digestOf = (bytes: Uint8Array): string => crypto.hash('sha256', bytes, 'hex')
const open = (folder: string): Promise<Repository> => openRepository(new DirectoryStore(realHost, folder), inline())

/** Backs up a disk that changes, mostly as an incremental, and gives old ones up. */
async function client({ folder, seed, minutes }: Task): Promise<Done> {
  const random = new Random(seed)
  const content = noise(random, SIZE)
  const repository = await open(folder)
  const own: string[] = []
  let forgotten = 0
  let backups = 0
  for (const end = performance.now() + minutes * 60_000; performance.now() < end; backups++) {
    const parent = random.chance(0.9) ? own.at(-1) : undefined
    // A full meets what the other clients have stored too.
    const changes = parent === undefined ? [{ offset: 0, length: SIZE }] : changeSome(content, random, 20, 65_536)
    const writer = await repository.begin({
      machine: `vm${seed}`,
      moment: Date.now(),
      kind: parent === undefined ? 'full' : 'incremental',
      disks: [{ name: 'sda', size: SIZE, ...(parent && { parent: { backup: parent, disk: 'sda' } }) }],
    })
    for (const { offset, length } of changes) await writer.disk(0).write(offset, length, content, offset)
    const { id } = await writer.finish({ labels: { digest: digestOf(content) } })
    own.push(id)
    while (own.length > 6) {
      // The newest stays: it is the next one's parent.
      const [old = ''] = own.splice(random.below(own.length - 1), 1)
      await repository.forget(old)
      forgotten++
    }
  }
  return { backups, forgotten, prunings: 0, removedPacks: 0, waits: 0 }
}

async function pruner({ folder, seed, minutes }: Task): Promise<Done> {
  const random = new Random(seed)
  const repository = await open(folder)
  const sums = { backups: 0, forgotten: 0, prunings: 0, removedPacks: 0, waits: 0 }
  for (const end = performance.now() + minutes * 60_000; performance.now() < end; sums.prunings++) {
    const { removedPacks, waitingPacks } = await repository.prune({ repackBelow: random.pick([0, 0.5, 0.9]) })
    sums.removedPacks += removedPacks
    if (waitingPacks > 0) sums.waits++
    if (random.chance(0.1)) {
      const report = await repository.check()
      assert.ok(report.isGood, JSON.stringify(report))
    }
  }
  return sums
}

/** Sends a process its task; resolves with what it did. */
function begin(task: Task): Promise<Done> {
  const child: ChildProcess = fork(import.meta.filename)
  return new Promise((resolve, reject) => {
    child.on('message', (said: { done?: Done; failure?: string }) => {
      if (said.done !== undefined) resolve(said.done)
      else reject(new Error(said.failure))
    })
    child.on('exit', (status) => reject(new Error(`a ${task.role} ended with ${status}`)))
    child.send(task)
  })
}

async function parent(): Promise<void> {
  const { values } = parseArgs({
    options: {
      minutes: { type: 'string', default: '5' },
      clients: { type: 'string', default: '2' },
      folder: { type: 'string', default: os.tmpdir() },
    },
  })
  const folder = fs.mkdtempSync(path.join(values.folder, 'varve-traffic-'))
  try {
    await initInline(new DirectoryStore(realHost, folder))
    const minutes = Number(values.minutes)
    const clients = Array.from({ length: Number(values.clients) }, (_, i) => i + 1)
    const tasks: Task[] = clients.map((seed) => ({ role: 'client', folder, seed, minutes }))
    const all = await Promise.all([...tasks, { role: 'pruner' as const, folder, seed: 0, minutes }].map(begin))
    const sum = (field: keyof Done): number => all.reduce((total, done) => total + done[field], 0)
    const repository = await open(folder)
    const { backups } = await repository.list()
    for (const { id, labels } of backups) {
      assert.ok((await repository.verify(id)).isGood, id)
      assert.equal(digestOf(await restore(repository, id)), labels['digest'], id)
    }
    assert.equal(backups.length, sum('backups') - sum('forgotten'))
    await repository.prune()
    const report = await repository.check({ reads: () => true })
    assert.ok(report.isGood, JSON.stringify(report))
    const figures = `${sum('backups')} backups, ${sum('forgotten')} forgotten, ${sum('prunings')} prunings, ${sum('waits')} of which left marks`
    console.log(`${figures}; ${sum('removedPacks')} packs removed; the ${backups.length} that are left are whole`)
  } finally {
    fs.rmSync(folder, { recursive: true, force: true })
  }
}

if (process.send === undefined) await parent()
else {
  process.once('message', (task: Task) => {
    const work = task.role === 'client' ? client(task) : pruner(task)
    work
      .then((done) => process.send?.({ done }))
      .catch((error: unknown) => {
        const text = isBlockError(error) ? `${error.kind}: ${error.stack}` : String((error as Error).stack)
        process.send?.({ failure: `${task.role} ${task.seed}: ${text}` })
      })
      .finally(() => process.disconnect())
  })
}
