// `varve export` as a user has it: other people's programs read a backup over NBD, see its holes, and write into one that forgets it all.

import assert from 'node:assert/strict'
import fs from 'node:fs'
import { after, before, test } from 'node:test'
import { Random } from '../../src/base/random.ts'
import { realHost } from '../../src/host/real.ts'
import { openRepository } from '../../src/repository/repository.ts'
import { DirectoryStore } from '../../src/repository/stores/directory.ts'
import { beginFull, inline, noise } from '../support/backups.ts'
import { missing, peer, runPeer } from '../support/peer.ts'
import { MIB, type Running, Site, STATUS } from '../support/site.ts'

const SIZE = 64 * MIB
/** Where sda has data; sdb has none. */
const RUNS = [
  [0, MIB],
  [5 * MIB, 8192],
  [40 * MIB, 3 * MIB],
] as const

let site: Site
let id: string

before(async () => {
  site = Site.make()
  await site.done('repo', 'init', site.repository)
  const repository = await openRepository(new DirectoryStore(realHost, site.repository), inline())
  const writer = await beginFull(repository, [
    { name: 'sda', size: SIZE },
    { name: 'sdb', size: MIB },
  ])
  for (const [offset, length] of RUNS) await writer.disk(0).write(offset, length, noise(new Random(offset), length), 0)
  id = (await writer.finish()).id
  await repository.close()
  await site.done('restore', `${id}:sda`, '--repo', site.repository, '--to', site.path('restored.raw'))
})
after(() => site.end())

interface Exported {
  readonly uri: string
  /** Tells it to stop; resolves when it has ended well. */
  readonly stop: () => Promise<void>
}

async function startExport(...args: string[]): Promise<Exported> {
  const socket = site.path('export.sock')
  const running: Running = site.begin('export', ...args, '--repo', site.repository, '--socket', socket)
  while (!fs.existsSync(socket) && running.child.exitCode === null) await new Promise((turn) => setTimeout(turn, 10))
  const stop = async (): Promise<void> => {
    running.child.kill('SIGTERM')
    const { status, stdout, stderr } = await running.ended
    assert.equal(status, STATUS.done, stderr)
    assert.equal(stdout, `${uri}\n`)
  }
  const uri = `nbd+unix:///?socket=${socket}`
  return { uri, stop }
}

const SKIP = { skip: missing('nbdinfo', 'nbdcopy', 'qemu-img', 'qemu-io') }

test('nbdinfo sees the holes of an exported backup, and nbdcopy makes of it what a restore makes', SKIP, async () => {
  const { uri, stop } = await startExport(`${id}:sda`)
  const map = JSON.parse(peer('nbdinfo', '--map', '--json', uri)) as { offset: number; length: number; type: number }[]
  const data = map.filter(({ type }) => type === 0).map(({ offset, length }) => [offset, length])
  assert.deepEqual(
    data,
    RUNS.map((run) => [...run]),
  )
  peer('nbdcopy', uri, site.path('copied.raw'))
  assert.ok(fs.readFileSync(site.path('copied.raw')).equals(fs.readFileSync(site.path('restored.raw'))))
  assert.match(runPeer('nbdinfo', [uri]).stdout, /is_read_only: true/)
  assert.notEqual(runPeer('qemu-io', ['-f', 'raw', '-c', 'write 0 4096', uri]).status, 0)
  await stop()
})

test('a writable export shows what was written, and the next one does not', SKIP, async () => {
  const overlays = site.path('overlays')
  fs.mkdirSync(overlays)
  const first = await startExport(`${id}:sda`, '--writable', '--overlay-folder', overlays)
  peer('qemu-io', '-f', 'raw', '-c', 'write -P 7 1000 70000', '-c', 'write -z 40M 1M', '-c', 'flush', first.uri)
  peer('qemu-io', '-f', 'raw', '-c', 'read -P 7 1000 70000', '-c', 'read -P 0 40M 1M', first.uri)
  assert.deepEqual(fs.readdirSync(overlays), [], 'nothing is left over, however it ends')
  await first.stop()
  const second = await startExport(`${id}:sda`, '--writable', '--overlay-folder', overlays)
  peer('qemu-img', 'compare', '-f', 'raw', '-F', 'raw', second.uri, site.path('restored.raw'))
  await second.stop()
})

test('an export that cannot be is refused in one line', async () => {
  const refuses = (status: number, says: RegExp, ...args: string[]): Promise<string> =>
    site.refuses(['export', ...args, '--repo', site.repository], status, says)
  await refuses(STATUS.usage, /has the disks sda, sdb: name one, as .*:sda/, id)
  await refuses(STATUS.notFound, /has no disk sdc; it has sda, sdb/, `${id}:sdc`)
  await refuses(STATUS.notFound, /has no backup/, 'yesterday')
  await refuses(STATUS.usage, /write BACKUP\[:DISK\]/, `${id}:sda:1`)
  await refuses(STATUS.usage, /either a socket or a port/, `${id}:sda`, '--socket', site.path('s'), '--port', '0')
})
