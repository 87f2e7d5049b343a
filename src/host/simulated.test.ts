import assert from 'node:assert/strict'
import path from 'node:path'
import { test } from 'node:test'
import { Random, seedOfRun } from '../base/random.ts'
import { isBlockError } from '../block/error.ts'
import { tempFolder } from '../../test/support/temp.ts'
import type { Host, HostFile } from './host.ts'
import { realHost } from './real.ts'
import { SimulatedHost } from './simulated.ts'
import { syscalls } from './syscalls.ts'

async function readAll(file: HostFile): Promise<Buffer> {
  const into = Buffer.alloc(file.size(), 0xee)
  await file.read(0, into.length, into, 0)
  return into
}

async function write(file: HostFile, offset: number, length: number, value: number): Promise<void> {
  await file.write(offset, length, Buffer.alloc(length, value), 0)
}

function openNew(host: Host, name: string): Promise<HostFile> {
  return host.open(name, { write: true, create: 'exclusive' })
}

/** What became of an operation: its result, or the kind of its error. */
async function outcome(work: () => Promise<unknown> | undefined): Promise<unknown> {
  try {
    return (await work()) ?? 'done'
  } catch (error) {
    if (isBlockError(error)) return error.kind
    throw error
  }
}

test('random operations have the same outcome on the simulated host as on the real one', async (t) => {
  const random = new Random(seedOfRun())
  t.diagnostic(`VARVE_SEED=${random.seed}`)
  const root = tempFolder(t)
  const simulated = new SimulatedHost({ scheduler: new Random(random.seed) })
  await simulated.makeFolder(root)
  const both: Host[] = [realHost, simulated]
  const names = ['a', 'b', 'folder/c'].map((name) => path.join(root, name))
  for (const host of both) await host.makeFolder(path.join(root, 'folder'))
  const same = async (work: (host: Host) => Promise<unknown> | undefined): Promise<void> => {
    assert.deepEqual(await outcome(() => work(simulated)), await outcome(() => work(realHost)))
  }
  for (let step = 0; step < 400; step++) {
    const name = random.pick(names)
    const kind = random.below(8)
    if (kind === 0) await same((host) => host.unlink(name))
    else if (kind === 1) {
      const to = random.pick(names)
      await same((host) => host.rename(name, to))
    } else {
      const create = random.pick(['never', 'if-missing', 'exclusive'] as const)
      const [offset, length, value] = [random.below(30_000), random.between(1, 12_000), random.between(1, 255)]
      await same(async (host) => {
        const file = await host.open(name, { write: true, create })
        try {
          if (kind < 5) await write(file, offset, length, value)
          else if (kind === 5) await file.punch(offset, length)
          else if (kind === 6) await file.zero(offset, length)
          else await file.truncate(offset)
          return [file.size(), (await readAll(file)).toString('latin1')]
        } finally {
          await file.close()
        }
      })
    }
    await same((host) => host.list(root))
    await same(async (host) => (await host.status(name))?.size)
  }
})

const skip = syscalls === undefined && 'no locks without system calls'

test('claims conflict as on the real host, and end with their handle', { skip }, async (t) => {
  const root = tempFolder(t)
  const simulated = new SimulatedHost()
  await simulated.makeFolder(root)
  for (const host of [realHost, simulated]) {
    const name = path.join(root, 'locked')
    await (await openNew(host, name)).close()
    const reader = await host.open(name, { lock: 'read' })
    const second = await host.open(name, { lock: 'read' })
    await assert.rejects(host.open(name, { write: true, lock: 'write' }), { kind: 'busy' })
    await second.close()
    reader.lock(undefined)
    const writer = await host.open(name, { write: true, lock: 'write' })
    assert.throws(() => reader.lock('read'), { kind: 'busy' })
    await writer.close()
    reader.lock('read')
    await reader.close()
  }
})

test('what was written survives the death of the process, whose handles and claims are gone', async () => {
  const host = new SimulatedHost()
  const file = await openNew(host, '/a')
  file.lock('write')
  await write(file, 0, 5000, 7)
  const boot = host.bootId()
  host.killProcess()
  await assert.rejects(async () => write(file, 0, 1, 1), { kind: 'closed' })
  await assert.rejects(file.sync(), { kind: 'closed' })
  const again = await host.open('/a', { write: true, lock: 'write' })
  assert.ok((await readAll(again)).equals(Buffer.alloc(5000, 7)))
  assert.equal(host.bootId(), boot)
})

test('a power loss keeps what was synced under a synced name, and may lose everything else', async () => {
  const host = new SimulatedHost()
  const boot = host.bootId()
  const file = await openNew(host, '/a')
  await host.syncFolder('/')
  await write(file, 0, 4096, 1)
  await file.sync()
  await write(file, 2048, 4096, 2)
  await openNew(host, '/b')
  const kept = host.clone()
  host.crash('none')
  kept.crash('all')
  assert.notEqual(host.bootId(), boot)
  assert.deepEqual(await host.list('/'), ['a'])
  assert.deepEqual(await kept.list('/'), ['a', 'b'])
  assert.ok((await readAll(await host.open('/a'))).equals(Buffer.alloc(4096, 1)))
  const expected = Buffer.concat([Buffer.alloc(2048, 1), Buffer.alloc(4096, 2)])
  assert.ok((await readAll(await kept.open('/a'))).equals(expected))
})

test('a power loss reaches lost, whole and torn writes, and tears at sectors only', async () => {
  const host = new SimulatedHost()
  const file = await openNew(host, '/a')
  await host.syncFolder('/')
  await write(file, 0, 8192, 1)
  await file.sync()
  await write(file, 1000, 3000, 2)
  await write(file, 3000, 6000, 3)
  const seen = new Set<string>()
  for (let seed = 0; seed < 300; seed++) {
    const after = host.clone()
    after.crash(new Random(seed))
    const bytes = await readAll(await after.open('/a'))
    for (let at = 0; at < bytes.length; at++) {
      const isEdge = at % 512 === 0 || at === 1000 || at === 4000 || at === 3000
      assert.ok(isEdge || bytes[at] === bytes[at - 1], `torn at ${at}`)
    }
    seen.add(`${[1, 2, 3].map((value) => bytes.includes(value)).join()} ${bytes.length}`)
  }
  assert.ok(seen.size >= 6, [...seen].join('; '))
})

test('a rename is lost or done whole, in order with the name changes before it', async () => {
  const host = new SimulatedHost()
  await host.makeFolder('/to')
  const old = await openNew(host, '/to/x')
  await write(old, 0, 1, 1)
  await old.sync()
  await host.syncFolder('/to')
  const fresh = await openNew(host, '/tmp')
  await write(fresh, 0, 1, 2)
  await fresh.sync()
  await host.rename('/tmp', '/to/x')
  const seen = new Set<string>()
  for (let seed = 0; seed < 60; seed++) {
    const after = host.clone()
    after.crash(new Random(seed))
    const value = (await readAll(await after.open('/to/x')))[0]
    seen.add(`${value} ${(await after.list('/')).join()}`)
  }
  assert.deepEqual([...seen].sort(), ['1 tmp,to', '1 to', '2 to'])
  await host.syncFolder('/to')
  host.crash('none')
  assert.deepEqual(await host.list('/'), ['to'])
  assert.equal((await readAll(await host.open('/to/x')))[0], 2)
})

test('a buffer that is used again after a write does not change what was written', async () => {
  const host = new SimulatedHost()
  const file = await openNew(host, '/a')
  await host.syncFolder('/')
  const buffer = Buffer.alloc(512, 1)
  await file.write(0, 512, buffer, 0)
  buffer.fill(2)
  await file.sync()
  host.crash('none')
  assert.ok((await readAll(await host.open('/a'))).equals(Buffer.alloc(512, 1)))
})

test('a change of length that was not synced is lost or kept with a power loss', async () => {
  const host = new SimulatedHost()
  const file = await openNew(host, '/a')
  await host.syncFolder('/')
  await file.truncate(5000)
  const sizes = new Set<number>()
  for (let seed = 0; seed < 20; seed++) {
    const after = host.clone()
    after.crash(new Random(seed))
    sizes.add((await after.status('/a'))?.size ?? -1)
  }
  assert.deepEqual(sizes, new Set([5000, 0]))
})

test('a sync that fails loses what it should have written, and the next one does not notice', async () => {
  const host = new SimulatedHost()
  const file = await openNew(host, '/a')
  await host.syncFolder('/')
  await write(file, 0, 512, 1)
  host.beforeOperation = (operation) => {
    if (operation.kind === 'sync') throw new Error('injected')
  }
  await assert.rejects(file.sync(), /injected/)
  host.beforeOperation = undefined
  await write(file, 512, 512, 2)
  await file.sync()
  assert.equal((await readAll(file))[0], 1)
  host.crash('all')
  const bytes = await readAll(await host.open('/a'))
  assert.deepEqual([bytes[0], bytes[512]], [0, 2])
})

test('a hook sees every operation in turn and may end the process in the middle of one', async () => {
  const host = new SimulatedHost()
  const seen: string[] = []
  host.beforeOperation = ({ kind, number }) => {
    seen.push(`${number} ${kind}`)
    if (number === 4) host.crash('all')
  }
  const file = await openNew(host, '/a')
  await write(file, 0, 1, 1)
  await host.syncFolder('/')
  await assert.rejects(file.sync(), { kind: 'closed' })
  assert.deepEqual(seen, ['1 create', '2 write', '3 syncFolder', '4 sync'])
  await assert.rejects(host.open('/missing'), { kind: 'not-found' })
})

test('a change that does not fit the capacity fails as no-space and changes nothing, and punching makes room', async () => {
  const host = new SimulatedHost({ capacity: 8192 })
  const file = await openNew(host, '/a')
  await write(file, 0, 8192, 1)
  await assert.rejects(async () => write(file, 8000, 200, 2), { kind: 'no-space' })
  assert.ok((await readAll(file)).equals(Buffer.alloc(8192, 1)))
  await file.punch(0, 4096)
  await write(file, 8192, 100, 2)
  assert.equal((await host.status('/a'))?.allocated, 8192)
})

test('with a scheduler requests complete in any order, and those in flight when the process dies fail', async () => {
  const orders = new Set<string>()
  for (let seed = 0; seed < 40; seed++) {
    const host = new SimulatedHost({ scheduler: new Random(seed) })
    const file = await openNew(host, '/a')
    const done: number[] = []
    await Promise.all(
      [0, 1, 2].map(async (i) => {
        await file.write(i, 1, Buffer.of(i), 0)
        done.push(i)
      }),
    )
    orders.add(done.join())
    const pending = Array.from({ length: 20 }, () => file.write(0, 1, Buffer.of(9), 0)).filter((p) => p !== undefined)
    assert.ok(pending.length > 0)
    host.killProcess()
    for (const each of await Promise.allSettled(pending)) assert.equal(each.status, 'rejected')
  }
  assert.ok(orders.size >= 4, [...orders].join(' '))
})

test('a clone goes its own way', async () => {
  const host = new SimulatedHost()
  const file = await openNew(host, '/a')
  await write(file, 0, 4096, 1)
  const other = host.clone()
  await write(file, 0, 4096, 2)
  const theirs = await other.open('/a', { write: true })
  assert.equal((await readAll(theirs))[0], 1)
  await write(theirs, 0, 4096, 3)
  assert.equal((await readAll(file))[0], 2)
  assert.equal((await readAll(await other.clone().open('/a')))[0], 3)
})
