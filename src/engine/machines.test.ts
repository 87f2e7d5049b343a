import assert from 'node:assert/strict'
import { test } from 'node:test'
import { Mutex } from '../base/mutex.ts'
import { type ErrorKind, isBlockError } from '../block/error.ts'
import { type DiskRecord, MemoryCatalog } from './catalog.ts'
import { Machines } from './machines.ts'

const disk = (name: string): DiskRecord => ({ id: `id-${name}`, name, layers: [], addedMs: 0, nextOverlay: 1 })

async function home(...disks: string[]): Promise<{ catalog: MemoryCatalog; machines: Machines }> {
  const catalog = new MemoryCatalog()
  await catalog.commit(disks.map((name) => ({ put: 'disk', record: disk(name) })))
  return { catalog, machines: new Machines(catalog, (changes) => catalog.commit(changes), new Mutex()) }
}

async function refused(kind: ErrorKind, work: () => Promise<unknown>, says: RegExp): Promise<void> {
  await assert.rejects(work, (error) => isBlockError(error, kind) && says.test(error.message))
}

test('a machine has its disks, takes more and lets others go, and the last one stays', async () => {
  const { machines } = await home('root', 'data', 'swap')
  assert.deepEqual(await machines.create('vm1', ['root', 'data']), { name: 'vm1', disks: ['root', 'data'] })
  assert.deepEqual(await machines.change('vm1', { add: ['swap'] }), { name: 'vm1', disks: ['root', 'data', 'swap'] })
  assert.deepEqual(await machines.change('vm1', { remove: ['root', 'swap'] }), { name: 'vm1', disks: ['data'] })
  await refused('invalid-argument', () => machines.change('vm1', { remove: ['data'] }), /machine remove vm1/)
  await refused('not-found', () => machines.change('vm1', { remove: ['root'] }), /has no disk root/)
  await machines.remove('vm1')
  assert.deepEqual(machines.list(), [])
  await refused('not-found', () => machines.remove('vm1'), /no machine vm1/)
})

test('a machine and a disk never share a name, and a disk is of one machine at most', async () => {
  const { machines } = await home('root', 'data')
  await refused('exists', () => machines.create('root', ['data']), /there is a disk root/)
  await machines.create('vm1', ['root'])
  await refused('exists', () => machines.create('vm1', ['data']), /a machine vm1 already/)
  await refused('busy', () => machines.create('vm2', ['data', 'root']), /of machine vm1/)
  await refused('invalid-argument', () => machines.create('vm2', ['data', 'data']), /named twice/)
  await refused('not-found', () => machines.create('vm2', ['none']), /no disk none/)
  await refused('invalid-argument', () => machines.create('a/b', ['data']), /machine name/)
})

test('a disk of no machine is one by itself, unless its guests are elsewhere', async () => {
  const { catalog, machines } = await home('root', 'data', 'alone', 'gone')
  const mark = { home: 'h', token: 't', target: 'u', from: 'f' }
  const incoming = { ...disk('coming'), incoming: mark } as unknown as DiskRecord
  await catalog.commit([{ put: 'disk', record: incoming }])
  await machines.create('vm1', ['root', 'data'])
  assert.deepEqual(
    machines.all().map(({ name }) => name),
    ['vm1', 'alone', 'gone'],
  )
  assert.deepEqual(machines.named('alone'), { name: 'alone', disks: ['alone'] })
  assert.throws(
    () => machines.named('nobody'),
    (error) => isBlockError(error, 'not-found'),
  )
})

test('names that are said together are all their disks, and one machine only where they are just that', async () => {
  const { machines } = await home('root', 'data', 'alone')
  await machines.create('vm1', ['root', 'data'])
  assert.deepEqual(machines.together(['vm1']), { disks: ['root', 'data'], machine: 'vm1' })
  assert.deepEqual(machines.together(['vm1', 'alone']), { disks: ['root', 'data', 'alone'] })
  assert.deepEqual(machines.together(['alone']), { disks: ['alone'] })
})
