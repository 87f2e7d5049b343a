// A daemon that was told the passphrase of its repository by its environment: backups, incrementals and restores as ever, and none without it.

import assert from 'node:assert/strict'
import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { test } from 'node:test'
import { Random } from '../../src/base/random.ts'
import { MIB, Site, STATUS } from '../support/site.ts'

const VARIABLE = 'VARVE_PASSPHRASE_FILE'

test('a daemon backs up into an encrypted repository, and who has no passphrase reads nothing of it', async (t) => {
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'varve-passphrase-'))
  const file = path.join(folder, 'passphrase')
  fs.writeFileSync(file, 'correct horse battery staple\n', { mode: 0o600 })
  process.env[VARIABLE] = file
  const site = await Site.start()
  t.after(async () => {
    delete process.env[VARIABLE]
    await site.end()
    fs.rmSync(folder, { recursive: true })
  })
  await site.disk('vm1', '8M')
  const content = new Random(1).fill(Buffer.alloc(2 * MIB))
  const guest = await site.guest('vm1')
  await guest.write(0, 2 * MIB, content, 0, 0)
  await site.done('backup', 'vm1', '--repo', site.repository)
  content.fill(7, 8192, 12_288)
  await guest.write(8192, 4096, content, 8192, 0)
  const said = await site.done('backup', 'vm1', '--repo', site.repository)
  assert.match(said, /incremental/)
  await guest.close()
  const [backup = ''] = said.split('\n')
  await site.done('restore', backup, '--repo', site.repository, '--to', site.path('restored.raw'))
  assert.ok(
    fs
      .readFileSync(site.path('restored.raw'))
      .subarray(0, 2 * MIB)
      .equals(content),
  )
  const { uri = '' } = await site.daemon.api.call('showDisk', { disk: 'vm1' }, {})
  await site.done('verify', backup, '--repo', site.repository, '--against', uri)
  delete process.env[VARIABLE]
  await site.refuses(['backups', '--repo', site.repository], STATUS.failed, /is encrypted: give its passphrase/)
  await site.refuses(['verify', backup, '--repo', site.repository], STATUS.failed, /is encrypted/)
})
