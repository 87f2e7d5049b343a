import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { utf8 } from '../../base/bytes.ts'
import { BlockError, isBlockError } from '../../block/error.ts'
import { SimulatedHost } from '../../host/simulated.ts'
import { createQcow2 } from './create.ts'
import { encodeHeader, type HeaderExtension, readHeader } from './header.ts'
import { openQcow2 } from './image.ts'
import { EXT_DATA_FILE } from './spec.ts'

const SIZE = 1024 * 1024
const CLUSTER = 4096

async function newImage(): Promise<SimulatedHost> {
  const host = new SimulatedHost()
  await createQcow2(host, '/disk', { size: SIZE, clusterSize: CLUSTER, dataFile: 'data' })
  return host
}

/** Has the header name another data file, or none. */
async function rename(host: SimulatedHost, name: string | undefined): Promise<void> {
  const file = await host.open('/disk', { write: true })
  const header = await readHeader(file)
  const extension: HeaderExtension[] = name === undefined ? [] : [{ type: EXT_DATA_FILE, data: utf8.encode(name) }]
  const bytes = Buffer.alloc(CLUSTER)
  bytes.set(encodeHeader({ ...header, extensions: extension }))
  await file.write(0, bytes.length, bytes, 0)
  await file.close()
}

async function refuses(host: SimulatedHost, kind: string, message: RegExp): Promise<void> {
  await assert.rejects(
    openQcow2(host, '/disk', { name: 'disk' }),
    (error) => isBlockError(error) && error.kind === kind && message.test(error.message),
  )
}

suite('an external data file', () => {
  test('holds the guest’s data at the guest’s own offsets', async () => {
    const host = await newImage()
    const image = await openQcow2(host, '/disk', { name: 'disk' })
    assert.equal(image.dataFile, '/data')
    await image.setAccess('write')
    await image.write(300_000, 5, utf8.encode('varve'), 0, 0)
    await image.close()
    const data = await host.open('/data')
    const found = new Uint8Array(5)
    await data.read(300_000, 5, found, 0)
    assert.equal(utf8.decode(found), 'varve')
    assert.equal(data.size(), SIZE)
  })

  test('that is raw is mapped whole, also where the disk grows, so that what others write to it shows', async () => {
    for (const extendedL2 of [false, true]) {
      const host = new SimulatedHost()
      await createQcow2(host, '/disk', { size: SIZE, dataFile: 'data', dataFileRaw: true, extendedL2 })
      const image = await openQcow2(host, '/disk', { name: 'disk' })
      await image.setAccess('write')
      await image.grow(3 * SIZE)
      await image.close()
      const data = await host.open('/data', { write: true })
      assert.equal(data.size(), 3 * SIZE)
      const again = await openQcow2(host, '/disk', { name: 'disk' })
      for (const offset of [0, SIZE - 512, 3 * SIZE - 512]) {
        await data.write(offset, 5, utf8.encode('varve'), 0)
        const seen = new Uint8Array(5)
        await again.read(offset, 5, seen, 0)
        assert.equal(utf8.decode(seen), 'varve')
      }
      await again.close()
    }
  })

  test('is claimed with the image: for reading when it is opened, alone while it is written', async () => {
    const host = await newImage()
    const image = await openQcow2(host, '/disk', { name: 'disk' })
    await assert.rejects(host.open('/data', { write: true, lock: 'write' }), (error) => isBlockError(error, 'busy'))
    const reader = await host.open('/data', { lock: 'read' })
    await assert.rejects(image.setAccess('write'), (error) => isBlockError(error, 'busy'))
    const other = await host.open('/disk', { lock: 'read' })
    await other.close()
    await reader.close()
    await image.setAccess('write')
    await assert.rejects(host.open('/data', { lock: 'read' }), (error) => isBlockError(error, 'busy'))
    await image.setAccess('read')
    await (await host.open('/data', { lock: 'read' })).close()
    await image.close()
  })

  test('shows nothing of what lay in a cluster before it was mapped, even when a process and then the host dies', async () => {
    const host = await newImage()
    const data = await host.open('/data', { write: true })
    await data.write(0, CLUSTER, new Uint8Array(CLUSTER).fill(0xee), 0)
    await data.sync()
    // The first process dies when it has overwritten that with the guest's zeros, before it syncs them.
    const first = await openQcow2(host, '/disk', { name: 'disk' })
    await first.setAccess('write')
    host.beforeOperation = ({ kind, path }) => {
      if (kind === 'sync' && path === '/data') host.killProcess()
    }
    await assert.rejects(async () => first.write(0, CLUSTER, new Uint8Array(CLUSTER), 0, 0))
    host.beforeOperation = undefined
    // For the second the cluster is empty. The power fails when of its write only the map is durable.
    const second = await openQcow2(host, '/disk', { name: 'disk' })
    await second.setAccess('write')
    await second.write(0, 512, new Uint8Array(512).fill(5), 0, 0)
    await (await host.open('/disk', { write: true })).sync()
    host.crash('none')
    const third = await openQcow2(host, '/disk', { name: 'disk' })
    const seen = new Uint8Array(CLUSTER).fill(1)
    await third.read(0, seen.length, seen, 0)
    assert.ok(seen.every((byte) => byte === 0))
    await third.close()
  })

  test('that is missing is refused, with what to do', async () => {
    const host = await newImage()
    await host.unlink('/data')
    await refuses(host, 'not-found', /data file \/data does not exist; bring it back, or name it with: qemu-img amend/)
  })

  test('that the header does not name is refused, with what to do', async () => {
    const host = await newImage()
    await rename(host, undefined)
    await refuses(host, 'invalid-format', /does not say which; name it with: qemu-img amend/)
  })

  for (const name of ['json:{"driver":"null-co"}', 'nbd:localhost:10809', 'https://example.org/data']) {
    test(`${name} is no path, and is refused`, async () => {
      const host = await newImage()
      await rename(host, name)
      await refuses(host, 'unsupported', /is no path/)
    })
  }

  test('is never the image itself', async () => {
    const host = await newImage()
    await rename(host, '../disk')
    await refuses(host, 'invalid-format', /names itself/)
  })

  test('is opened only when the caller admits it', async () => {
    const host = await newImage()
    const asked: string[] = []
    const admit = (file: string): void => {
      asked.push(file)
      throw new BlockError('permission', `${file} is not for you`)
    }
    await assert.rejects(openQcow2(host, '/disk', { name: 'disk', admit }), (error) =>
      isBlockError(error, 'permission'),
    )
    assert.deepEqual(asked, ['/data'])
  })

  test('that is raw excludes a backing file and needs a name', async () => {
    const host = new SimulatedHost()
    const backing = { name: 'base', format: 'raw' }
    for (const options of [{ dataFile: 'data', backing }, {}])
      await assert.rejects(createQcow2(host, '/disk', { size: SIZE, dataFileRaw: true, ...options }), (error) =>
        isBlockError(error, 'invalid-argument'),
      )
    assert.deepEqual(await host.list('/'), [])
  })

  test('that exists is not overwritten by a new image, and one that was made goes when the image cannot be made', async () => {
    const host = await newImage()
    const options = { size: SIZE, dataFile: 'data' }
    await assert.rejects(createQcow2(host, '/other', options), (error) => isBlockError(error, 'exists'))
    await assert.rejects(createQcow2(host, '/disk', { size: SIZE, dataFile: 'more' }), (error) =>
      isBlockError(error, 'exists'),
    )
    assert.deepEqual(await host.list('/'), ['data', 'disk'])
  })
})
