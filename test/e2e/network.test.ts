// Disks on the network: all of a daemon's disks by name on one TCP port, with and without TLS, with the metadata contexts that
// QEMU's clients ask for; and what is refused.

import assert from 'node:assert/strict'
import { execFile } from 'node:child_process'
import path from 'node:path'
import { type TestContext, test } from 'node:test'
import { promisify } from 'node:util'
import { SqliteCatalog } from '../../src/engine/sqlite-catalog.ts'
import { connectNbd } from '../../src/nbd/client.ts'
import { freePort } from '../support/free-port.ts'
import { missing } from '../support/peer.ts'
import { MIB, Site, STATUS } from '../support/site.ts'
import { makeCredentials } from '../support/tls.ts'

const run = promisify(execFile)

interface MapEntry {
  readonly offset: number
  readonly length: number
  readonly type: number
}

async function mapOf(uri: string, context: string): Promise<[number, number, number][]> {
  const { stdout } = await run('nbdinfo', [`--map=${context}`, '--json', uri], { timeout: 30_000 })
  return (JSON.parse(stdout) as MapEntry[]).map(({ offset, length, type }) => [offset, length, type])
}

async function startSite(t: TestContext, ...args: string[]): Promise<Site> {
  const site = await Site.start({ args })
  t.after(() => site.end())
  return site
}

test('all disks are on one port by name, with their bitmaps and how deep their data lies', {
  skip: missing('nbdinfo'),
}, async (t) => {
  const port = await freePort()
  const site = await startSite(t, '--nbd-port', String(port))
  await site.disk('vm1', '8M')
  await site.disk('vm2', '4M', 'raw')
  const list = JSON.parse((await run('nbdinfo', ['--list', '--json', `nbd://127.0.0.1:${port}`])).stdout) as {
    exports: { 'export-name': string }[]
  }
  assert.deepEqual(list.exports.map((found) => found['export-name']).sort(), ['vm1', 'vm2'])

  const uri = `nbd://127.0.0.1:${port}/vm1`
  const guest = await connectNbd(uri)
  const data = Buffer.alloc(MIB, 7)
  await guest.write(MIB, MIB, data, 0, 0)
  await site.done('snapshot', 'create', 'vm1', 'one')
  await guest.write(4 * MIB, MIB, data, 0, 0)
  assert.deepEqual(await mapOf(uri, 'qemu:allocation-depth'), [
    [0, MIB, 0],
    [MIB, MIB, 2],
    [2 * MIB, 2 * MIB, 0],
    [4 * MIB, MIB, 1],
    [5 * MIB, 3 * MIB, 0],
  ])

  await site.done('backup', 'vm1', '--repo', site.repository)
  await guest.write(6 * MIB + 4096, 8192, data, 0, 0)
  const { bitmaps } = await site.daemon.api.call('showDisk', { disk: 'vm1' }, {})
  assert.deepEqual(await mapOf(uri, `qemu:dirty-bitmap:${bitmaps[0]?.name}`), [
    [0, 6 * MIB + 4096, 0],
    [6 * MIB + 4096, 8192, 1],
    [6 * MIB + 12_288, 2 * MIB - 12_288, 0],
  ])
  await guest.close()
  await site.done('disk', 'remove', 'vm2')
  await assert.rejects(connectNbd(`nbd://127.0.0.1:${port}/vm2`), /no export named "vm2"/)
})

test('with certificates the port takes only clients that begin TLS', {
  skip: missing('openssl', 'nbdinfo'),
}, async (t) => {
  const { folder } = makeCredentials(t)
  const port = await freePort()
  const site = await startSite(t, '--nbd-port', String(port), '--tls-certificates', folder, '--tls-verify-peer')
  await site.disk('vm1', '4M')
  await assert.rejects(connectNbd(`nbd://127.0.0.1:${port}/vm1`), /TLS/)
  const uri = `nbds://localhost:${port}/vm1?tls-certificates=${folder}`
  const { stdout } = await run('nbdinfo', ['--size', uri], { timeout: 30_000 })
  assert.equal(Number(stdout), 4 * MIB)
})

/** What a start of the host anew shows: clients came under another boot. */
function pretendReboot(site: Site): void {
  const catalog = new SqliteCatalog(path.join(site.home, 'catalog.db'))
  for (const guest of catalog.list('guest'))
    void catalog.commit([{ put: 'guest', record: { ...guest, bootId: 'before' } }])
  catalog.close()
}

test('after an unclean stop of the host a disk that had a client on TCP is held there until it is released', async (t) => {
  const port = await freePort()
  const site = await startSite(t, '--nbd-port', String(port))
  for (const name of ['far', 'near']) await site.disk(name, '4M')
  const uri = (name: string): string => `nbd://127.0.0.1:${port}/${name}`
  const data = Buffer.alloc(4096, 7)
  const far = await connectNbd(uri('far'))
  await far.write(0, data.length, data, 0, 0)
  const near = await site.guest('near')
  await near.write(0, data.length, data, 0, 0)
  await site.daemon.kill()
  await Promise.allSettled([far.close(), near.close()])

  await site.daemon.start()
  await (await connectNbd(uri('far'))).close()
  await site.daemon.kill()
  pretendReboot(site)
  for (let start = 0; start < 2; start++) {
    await site.daemon.start()
    await assert.rejects(connectNbd(uri('far')), /the host stopped uncleanly.* varve disk release far/)
    await (await connectNbd(uri('near'))).close()
    await (await site.guest('far')).close()
    assert.match(await site.done('disk', 'show', 'far'), /^held: the host stopped uncleanly/m)
    assert.match(await site.done('disk', 'list'), /^far +held /m)
    // It stays so when the daemon ends, cleanly or not.
    await (start === 0 ? site.daemon.stop() : site.daemon.kill())
  }
  await site.daemon.start()
  await site.done('disk', 'release', 'far')
  await (await connectNbd(uri('far'))).close()
  await site.refuses(['disk', 'release', 'far'], STATUS.usage, /far is not held/)
  await site.refuses(['disk', 'release', 'none'], STATUS.notFound, /no disk none/)

  // A clean end leaves nothing that could be lost.
  await site.daemon.stop()
  pretendReboot(site)
  await site.daemon.start()
  await (await connectNbd(uri('far'))).close()
})

test('what would be open to the network is refused, and nothing is changed', async (t) => {
  const site = Site.make()
  t.after(() => site.end())
  await site.refuses(['serve', '--nbd-address', '0.0.0.0'], STATUS.failed, /beyond loopback needs TLS/)
  await site.refuses(['serve', '--insecure'], STATUS.usage, /--nbd-port/)
  await site.refuses(
    ['serve', '--nbd-port', '0', '--tls-psk', 'a', '--tls-certificates', 'b'],
    STATUS.usage,
    /not both/,
  )
  await site.refuses(['serve', '--nbd-port', '0', '--tls-psk', '/nowhere/keys'], STATUS.notFound, /\/nowhere\/keys/)
  await site.refuses(['serve', '--nbd-port', '0', '--tls-subject', 'CN=a'], STATUS.usage, /--tls-certificates/)
  const image = site.image('a.qcow2', '1M')
  await site.refuses(['nbd', image, '-f', 'qcow2', '--bind', '0.0.0.0', '--port', '0'], STATUS.failed, /needs TLS/)
})
