// One flipped bit in a repository: verify says where, restore refuses and leaves nothing behind, lists name what they cannot
// read, and what is not touched by the damage restores as before.

import assert from 'node:assert/strict'
import fs from 'node:fs'
import path from 'node:path'
import { after, before, test } from 'node:test'
import { Random } from '../../src/base/random.ts'
import { MIB, Site, STATUS } from '../support/site.ts'

const { corrupt } = STATUS

let site: Site
let backup = ''
let wanted: Buffer

before(async () => {
  site = await Site.start()
  await site.disk('vm1', '8M')
  wanted = Buffer.alloc(8 * MIB)
  new Random(3).fill(wanted.subarray(0, 3 * MIB))
  const guest = await site.guest('vm1')
  for (let offset = 0; offset < 3 * MIB; offset += MIB) await guest.write(offset, MIB, wanted, offset, 0)
  await guest.close()
  backup = idOf(await site.done('backup', 'vm1', '--repo', site.repository, '--json'))
})
after(() => site.end())

function idOf(said: string): string {
  return (JSON.parse(said) as { details: { backup: string } }).details.backup
}

/** The repository's files under a folder of it. */
function objects(folder: string): string[] {
  return fs.readdirSync(path.join(site.repository, folder)).map((name) => path.join(site.repository, folder, name))
}

/** Runs `work` with one bit of a file flipped. */
async function withFlippedBit(file: string, at: number, work: () => Promise<void>): Promise<void> {
  const whole = fs.readFileSync(file)
  const spoiled = Buffer.from(whole)
  spoiled[at] = (spoiled[at] as number) ^ 4
  fs.writeFileSync(file, spoiled)
  try {
    await work()
  } finally {
    fs.writeFileSync(file, whole)
  }
}

const verify = (): string[] => ['verify', backup, '--repo', site.repository]
const restore = (): string[] => ['restore', backup, '--repo', site.repository, '--to', site.path('restored.raw')]

async function refusesRestore(says: RegExp): Promise<void> {
  const filesBefore = fs.readdirSync(site.folder)
  await site.refuses(restore(), corrupt, says)
  assert.deepEqual(fs.readdirSync(site.folder), filesBefore)
}

/** Verify fails with a report on standard output that names the object, and one line on standard error. */
async function verifyFinds(file: string): Promise<void> {
  const { status, stdout, stderr } = await site.varve(...verify())
  const note = `${status}: ${stdout}${stderr}`
  assert.equal(status, corrupt, note)
  assert.match(stderr, new RegExp(`^varve: backup ${backup} is damaged: [^\\n]+\\n$`), note)
  assert.ok(stdout.includes(path.basename(file)), note)
}

async function restoresWhole(): Promise<void> {
  await site.done(...restore())
  assert.ok(fs.readFileSync(site.path('restored.raw')).equals(wanted))
  fs.rmSync(site.path('restored.raw'))
}

test('an undamaged backup verifies and restores', async () => {
  await site.done(...verify())
  await restoresWhole()
})

test('a flipped bit in a pack’s data is found and located, and the restore leaves no image', async () => {
  const pack = objects('packs').find((file) => fs.statSync(file).size > MIB)
  assert.ok(pack !== undefined)
  await withFlippedBit(pack, 500_000, async () => {
    await verifyFinds(pack)
    assert.match((await site.varve(...verify())).stdout, /vm1: \d+ bytes at \d+/)
    await refusesRestore(/vm1/)
  })
  await restoresWhole()
})

test('a flipped bit in a pack’s directory is found', async () => {
  const pack = objects('packs').find((file) => fs.statSync(file).size > MIB)
  assert.ok(pack !== undefined)
  await withFlippedBit(pack, fs.statSync(pack).size - 100, () => verifyFinds(pack))
})

test('a flipped bit in an index is found, and the backup restores whole without it', async () => {
  const [index] = objects('index')
  assert.ok(index !== undefined)
  await withFlippedBit(index, 100, async () => {
    await verifyFinds(index)
    await restoresWhole()
  })
})

test('a flipped bit in a manifest is found by every command that meets it', async () => {
  const [manifest] = objects('backups')
  assert.ok(manifest !== undefined)
  await withFlippedBit(manifest, 60, async () => {
    await site.refuses(verify(), corrupt, new RegExp(backup))
    await refusesRestore(new RegExp(backup))
    const listed = await site.varve('repo', 'list', site.repository)
    assert.equal(listed.status, corrupt)
    assert.match(listed.stderr, new RegExp(`^varve: 1 more cannot be read: .*${backup}.*\\n$`))
  })
})

test('a backup whose parent’s manifest is damaged is a full, and says why', async () => {
  const [manifest] = objects('backups')
  assert.ok(manifest !== undefined)
  await withFlippedBit(manifest, 60, async () => {
    const said = await site.done('backup', 'vm1', '--repo', site.repository)
    assert.match(said, new RegExp(`full \\(the earlier backup ${backup}`))
  })
})

test('a flipped bit in the config keeps the repository shut', async () => {
  const config = path.join(site.repository, 'config')
  await withFlippedBit(config, 30, async () => {
    const says = /repository.*config|config.*repository/
    await site.refuses(verify(), corrupt, says)
    await refusesRestore(says)
    await site.refuses(['repo', 'list', site.repository], corrupt, says)
    await site.refuses(['backup', 'vm1', '--repo', site.repository], corrupt, says)
    await site.refuses(['repo', 'init', site.repository], STATUS.busy, /already/)
  })
  await restoresWhole()
})

test('an object that is missing or cut short is damage like any other', async () => {
  const pack = objects('packs').find((file) => fs.statSync(file).size > MIB)
  assert.ok(pack !== undefined)
  const whole = fs.readFileSync(pack)
  fs.truncateSync(pack, 1000)
  await verifyFinds(pack)
  await refusesRestore(/vm1/)
  fs.rmSync(pack)
  await verifyFinds(pack)
  await refusesRestore(/vm1/)
  fs.writeFileSync(pack, whole)
  await restoresWhole()
})
