// `varve repo` and its kin as a user has them, without a daemon: what they print, how they exit, and what they refuse with one line.

import assert from 'node:assert/strict'
import fs from 'node:fs'
import { after, before, test } from 'node:test'
import { Random } from '../../src/base/random.ts'
import { realHost } from '../../src/host/real.ts'
import { openRepository } from '../../src/repository/repository.ts'
import { DirectoryStore } from '../../src/repository/stores/directory.ts'
import { backUp, inline, noise } from '../support/backups.ts'
import { MIB, Site, STATUS } from '../support/site.ts'

const { usage, notFound, busy, corrupt, failed } = STATUS
const DAY = 24 * 3_600_000

let site: Site
const ids: string[] = []
const contents: Buffer[] = []

/** Three daily backups of one disk, made by the library. */
before(async () => {
  site = Site.make()
  await site.done('repo', 'init', site.repository)
  const repository = await openRepository(new DirectoryStore(realHost, site.repository), inline())
  const content = noise(new Random(1), 2 * MIB)
  for (let day = 0; day < 3; day++) {
    noise(new Random(day + 2), MIB / 2).copy(content, (day * MIB) / 2)
    contents.push(Buffer.from(content))
    ids.push((await backUp(repository, content, undefined, Date.UTC(2026, 0, 1) + day * DAY)).id)
  }
  await repository.close()
})
after(() => site.end())

const repo = (...args: string[]): Promise<string> => site.done('repo', ...args)
const refuses = (status: number, says: RegExp, ...args: string[]): Promise<string> => site.refuses(args, status, says)
const [first, second, third] = [0, 1, 2].map((day) => () => ids[day] as string) as [
  () => string,
  () => string,
  () => string,
]

/** A copy of the repository's folder. */
function copyFolder(name: string): string {
  fs.cpSync(site.repository, site.path(name), { recursive: true })
  return site.path(name)
}

test('list, stats, tag and a prune that only says what it would do', async () => {
  assert.match(await repo('list', site.repository), new RegExp(`${first()}.*full.*sda`))
  assert.match(await repo('tag', site.repository, first(), '--add', 'gold', 'month'), /: gold month$/)
  assert.match(await repo('tag', site.repository, first(), '--remove', 'month'), /: gold$/)
  assert.match(await repo('list', site.repository), new RegExp(`${first()}.* gold`))
  const stats = JSON.parse(await repo('stats', site.repository, '--json')) as Record<string, number>
  assert.equal(stats['logicalBytes'], 6 * MIB)
  assert.equal(stats['backups'], 3)
  assert.match(await repo('stats', site.repository), /needed by several/)
  const planned = await repo('prune', site.repository, '--keep-last', '1', '--keep-tag', 'gold', '--dry-run')
  assert.match(planned, new RegExp(`keep +${third()} +last`))
  assert.match(planned, new RegExp(`keep +${first()} +tag gold`))
  assert.match(planned, new RegExp(`forget +${second()}`))
  assert.match(planned, /packs would be removed/)
  assert.equal((JSON.parse(await repo('list', site.repository, '--json')) as unknown[]).length, 3)
})

test('forget and prune give the space back, and what stays verifies against its image', async () => {
  const folder = copyFolder('pruned')
  assert.match(await repo('forget', folder, second()), new RegExp(`forgotten: ${second()}`))
  await refuses(notFound, /has no backup/, 'repo', 'forget', folder, second())
  const report = JSON.parse(await repo('prune', folder, '--keep-daily', '1', '--json')) as {
    forgotten: string[]
    removedPacks: number
  }
  assert.deepEqual(report.forgotten, [first()])
  assert.ok(report.removedPacks > 0)
  assert.match(await repo('check', folder, '--read-data'), /^1 backups, .* read as a whole .*: whole$/)
  fs.writeFileSync(site.path('third.raw'), contents[2] as Buffer)
  const against = ['verify', third(), '--repo', folder, '--against', site.path('third.raw')]
  assert.match(await site.done(...against, '-f', 'raw'), /disk sda: equal$/)
  await refuses(usage, /say what .* is: -f raw/, ...against)
  const other = Buffer.from(contents[2] as Buffer)
  other.fill(1, 8192, 12_288)
  fs.writeFileSync(site.path('third.raw'), other)
  const { status, stdout, stderr } = await site.varve(...against, '-f', 'raw')
  assert.equal(status, corrupt)
  assert.match(stdout, /different\n4096 bytes at 8192 differ/)
  assert.match(stderr, /differs from .* in 4096 bytes/)
})

test('damage is named with the backups it hits; salvage brings the rest; repair leaves what is good', async () => {
  const folder = copyFolder('damaged')
  const [pack = ''] = fs.readdirSync(`${folder}/packs`).map((name) => `${folder}/packs/${name}`)
  const bytes = fs.readFileSync(pack)
  bytes[100_000] = (bytes[100_000] as number) ^ 1
  fs.writeFileSync(pack, bytes)
  const { status, stdout, stderr } = await site.varve('repo', 'check', folder, '--read-data')
  assert.equal(status, corrupt, stdout)
  assert.match(stdout, /packs\/[0-9a-f]+: .*blobs are damaged/)
  const [, hit = ''] = /backup (\S+): 65536 bytes cannot be restored/.exec(stdout) ?? []
  assert.ok(ids.includes(hit), stdout)
  assert.match(stderr, /^varve: .* is damaged: 1 objects, \d of 3 backups are hit\n$/)
  const to = site.path('salvaged.raw')
  await refuses(corrupt, /sda/, 'restore', hit, '--repo', folder, '--to', to)
  assert.ok(!fs.existsSync(to))
  const salvaged = await site.varve('restore', hit, '--repo', folder, '--to', to, '--salvage')
  assert.equal(salvaged.status, corrupt)
  const [, length = '', offset = ''] = /lost: (\d+) bytes at (\d+)/.exec(salvaged.stdout) ?? []
  assert.equal(Number(length), 65_536)
  const expected = Buffer.from(contents[ids.indexOf(hit)] as Buffer)
  expected.fill(0, Number(offset), Number(offset) + Number(length))
  assert.ok(fs.readFileSync(to).equals(expected))
  const repaired = await site.varve('repo', 'check', folder, '--read-data', '--repair')
  assert.match(repaired.stdout, /repaired: 1 packs rewritten, \d+ blobs moved, 0 from other copies, 1 lost/)
  assert.match((await site.varve('repo', 'check', folder)).stdout, /its chunk is in no pack|cannot be restored/)
})

test('a check of a part, and one that goes on where another stopped', async () => {
  const notes = site.path('checked')
  assert.match(await repo('check', site.repository, '--sample', '0'), /^3 backups, 3 packs: whole$/)
  const packs = fs.readdirSync(`${site.repository}/packs`)
  fs.writeFileSync(notes, `${packs[0] ?? ''}\n`)
  assert.match(await repo('check', site.repository, '--read-data', '--resume', notes), / 2 read as a whole/)
  assert.ok(!fs.existsSync(notes), 'all was read: the next begins anew')
})

test('an encrypted repository opens with its passphrase or key alone, and takes copies', async () => {
  const folder = site.path('locked')
  fs.writeFileSync(site.path('passphrase'), 'correct horse\n', { mode: 0o600 })
  await repo('key', 'new', site.path('key'))
  assert.equal(fs.statSync(site.path('key')).mode & 0o777, 0o600)
  await refuses(busy, /is there already/, 'repo', 'key', 'new', site.path('key'))
  const passphrase = ['--passphrase-file', site.path('passphrase')]
  await repo('init', folder, ...passphrase)
  await refuses(failed, /is encrypted: give its passphrase/, 'repo', 'list', folder)
  const copied = await repo(
    'copy',
    site.repository,
    folder,
    third(),
    '--target-passphrase-file',
    site.path('passphrase'),
  )
  const [, copy = ''] = /-> (\S+), stored/.exec(copied) ?? []
  assert.match(
    await repo('key', 'add', folder, ...passphrase, '--new-key-file', site.path('key'), '--label', 'vault'),
    /^key /,
  )
  const key = ['--key-file', site.path('key')]
  assert.match(await repo('key', 'list', folder, ...key), /file .* vault/)
  await site.done('restore', copy, '--repo', folder, ...key, '--to', site.path('copied.raw'))
  assert.ok(fs.readFileSync(site.path('copied.raw')).equals(contents[2] as Buffer))
  await site.done('verify', copy, '--repo', folder, ...passphrase)
  await refuses(usage, /cannot be used with/, 'repo', 'list', folder, ...passphrase, ...key)
  await refuses(failed, /is not encrypted/, 'repo', 'list', site.repository, ...key)
  fs.writeFileSync(site.path('short'), 'abc\n')
  await refuses(usage, /is no key/, 'repo', 'list', folder, '--key-file', site.path('short'))
  await refuses(notFound, /nowhere/, 'repo', 'list', folder, '--key-file', site.path('nowhere'))
})

test('what cannot be meant is refused with one line', async () => {
  const nowhere = site.path('nowhere')
  for (const verb of ['list', 'stats', 'check', 'prune'])
    await refuses(notFound, /is no repository/, 'repo', verb, nowhere)
  await refuses(notFound, /has no backup/, 'repo', 'forget', site.repository, first(), '20260101T000000000Z-00000000')
  await refuses(usage, /is no tag/, 'repo', 'tag', site.repository, first(), '--add', 'a b')
  await refuses(usage, /not a number/, 'repo', 'prune', site.repository, '--keep-last', 'x')
  await refuses(usage, /would forget every backup/, 'repo', 'prune', site.repository, '--keep-tag', 'gold')
  await refuses(usage, /nothing is read/, 'repo', 'check', site.repository, '--resume', site.path('notes'))
  await refuses(
    notFound,
    /nowhere/,
    'repo',
    'check',
    site.repository,
    '--read-data',
    '--resume',
    site.path('nowhere', 'notes'),
  )
  await refuses(usage, /not a percentage/, 'repo', 'check', site.repository, '--sample', '101')
  await refuses(usage, /are one repository/, 'repo', 'copy', site.repository, site.repository)
  await refuses(usage, /unknown command/, 'repo', 'frobnicate')
  await refuses(usage, /say what is to open it/, 'repo', 'key', 'add', site.repository)
  assert.equal((JSON.parse(await repo('list', site.repository, '--json')) as unknown[]).length, 3)
})
