import assert from 'node:assert/strict'
import { test } from 'node:test'
import { createQcow2 } from '../format/qcow2/create.ts'
import { Qcow2Image } from '../format/qcow2/image.ts'
import { createRaw } from '../format/raw/raw.ts'
import { SimulatedHost } from '../host/simulated.ts'
import { openImage, openImageAlone, openMetadata, probeFormat } from './open-image.ts'

const MIB = 1024 * 1024

/** In /vm: base.qcow2, top.qcow2 over it, plain.raw; in /far: far.qcow2; /vm/reaching.qcow2 over that. */
async function makeHost(): Promise<SimulatedHost> {
  const host = new SimulatedHost()
  await host.makeFolder('/vm')
  await host.makeFolder('/far')
  await createQcow2(host, '/vm/base.qcow2', { size: MIB })
  await createQcow2(host, '/vm/top.qcow2', { size: MIB, backing: { name: 'base.qcow2', format: 'qcow2' } })
  await createQcow2(host, '/far/far.qcow2', { size: MIB })
  await createQcow2(host, '/vm/reaching.qcow2', { size: MIB, backing: { name: '/far/far.qcow2', format: 'qcow2' } })
  await createRaw(host, '/vm/plain.raw', MIB)
  return host
}

async function writeStart(host: SimulatedHost, path: string, bytes: Uint8Array): Promise<void> {
  const file = await host.open(path, { write: true })
  await file.write(0, bytes.length, bytes, 0)
  await file.close()
}

test('an image that names no other file opens as what its first bytes say', async () => {
  const host = await makeHost()
  for (const [path, format] of [
    ['/vm/base.qcow2', 'qcow2'],
    ['/vm/plain.raw', 'raw'],
  ] as const) {
    const chain = await openImage({ host, path })
    assert.equal(chain.active.format, format)
    assert.equal(chain.layers.length, 1)
    await chain.close()
  }
})

test('an image that was only recognized leads to no other file', async () => {
  const host = await makeHost()
  await assert.rejects(openImage({ host, path: '/vm/top.qcow2' }), {
    kind: 'permission',
    message: /-f qcow2 follows it/,
  })
  const alone = await openImageAlone({ host, path: '/vm/top.qcow2' })
  assert.deepEqual(alone.backingReference, { name: 'base.qcow2', format: 'qcow2' })
  await alone.close()
  const chain = await openImage({ host, path: '/vm/top.qcow2', format: 'qcow2' })
  assert.deepEqual(
    chain.layers.map((layer) => layer.path),
    ['/vm/base.qcow2', '/vm/top.qcow2'],
  )
  await chain.close()
})

test('an image opens as the format that was named, whatever its first bytes are', async () => {
  const host = await makeHost()
  const chain = await openImage({ host, path: '/vm/top.qcow2', format: 'raw' })
  assert.equal(chain.active.format, 'raw')
  assert.equal(chain.layers.length, 1)
  await chain.close()
  await assert.rejects(openImage({ host, path: '/vm/plain.raw', format: 'qcow2' }), { kind: 'invalid-format' })
})

test('a backing file in another folder is opened where that folder is allowed', async () => {
  const host = await makeHost()
  const wanted = { host, path: '/vm/reaching.qcow2', format: 'qcow2' } as const
  await assert.rejects(openImage(wanted), { kind: 'permission' })
  const chain = await openImage({ ...wanted, allowedFolders: ['/far'] })
  assert.equal(chain.layers[0]?.path, '/far/far.qcow2')
  await chain.close()
})

test('an image that somebody writes to is read only by who insists, and then not written', async () => {
  const host = await makeHost()
  const writer = await host.open('/vm/base.qcow2', { write: true, lock: 'write' })
  await assert.rejects(openImage({ host, path: '/vm/base.qcow2' }), { kind: 'busy' })
  const chain = await openImage({ host, path: '/vm/base.qcow2', forceShare: true })
  assert.equal(chain.size, MIB)
  await assert.rejects(chain.active.setAccess('write'))
  await chain.close()
  await writer.close()
})

test('formats that Varve does not open are recognized and refused by name', async () => {
  const host = await makeHost()
  for (const [bytes, name] of [
    ['KDMV', 'vmdk'],
    ['vhdxfile', 'vhdx'],
    ['conectix', 'vpc'],
    ['QED\0', 'qed'],
    [`${'\0'.repeat(0x40)}\x7f\x10\xda\xbe`, 'vdi'],
  ] as const) {
    await writeStart(host, '/vm/plain.raw', Buffer.alloc(512))
    await writeStart(host, '/vm/plain.raw', Buffer.from(bytes, 'latin1'))
    const refusal = { kind: 'unsupported', message: new RegExp(`looks like a ${name} image.*-f raw`) }
    await assert.rejects(probeFormat(host, '/vm/plain.raw'), refusal)
    const chain = await openImage({ host, path: '/vm/plain.raw', format: 'raw' })
    await chain.close()
  }
})

test('a data file is followed by who names the format, and not needed for what the image says', async () => {
  const host = await makeHost()
  const path = '/vm/split.qcow2'
  await createQcow2(host, path, { size: MIB, dataFile: 'split.data' })
  await assert.rejects(openImage({ host, path }), { kind: 'permission', message: /data file .*split\.data.*-f qcow2/ })
  const chain = await openImage({ host, path, format: 'qcow2' })
  await chain.read(0, 512, Buffer.alloc(512), 0)
  await chain.close()
  await host.unlink('/vm/split.data')
  await assert.rejects(openImage({ host, path, format: 'qcow2' }), { kind: 'not-found' })
  const said = await openMetadata({ host, path })
  assert.ok(said instanceof Qcow2Image)
  assert.equal(said.header.dataFile?.name, 'split.data')
  assert.equal((await said.check()).corruptions, 0)
  await said.close()
})

test('an image that is not there is not found, with and without a format', async () => {
  const host = await makeHost()
  for (const format of [undefined, 'raw', 'qcow2'] as const) {
    await assert.rejects(openImage({ host, path: '/vm/none', format }), { kind: 'not-found' })
    await assert.rejects(openImageAlone({ host, path: '/vm/none', format }), { kind: 'not-found' })
    await assert.rejects(openMetadata({ host, path: '/vm/none', format }), { kind: 'not-found' })
  }
})
