// `--cache` as a user has it: of `varve nbd`, and of a disk, whose mode the catalog keeps.

import assert from 'node:assert/strict'
import fs from 'node:fs'
import path from 'node:path'
import { test } from 'node:test'
import { connectNbd } from '../../src/nbd/client.ts'
import { assertClean, startDaemon } from '../support/daemon.ts'
import { missing } from '../support/peer.ts'

const KIB = 1024

test('a disk keeps its cache mode over a restart, also in its snapshots', { skip: missing('qemu-img') }, async (t) => {
  const { daemon, folder, varve } = await startDaemon(t)
  const images = ['none', 'unsafe', 'writeback'].map((mode) => {
    const image = path.join(folder, `${mode}.qcow2`)
    varve('disk', 'create', mode, image, '-f', 'qcow2', '--size', '16M', '--cache', mode)
    return image
  })
  const usual = path.join(folder, 'usual.raw')
  fs.writeFileSync(usual, Buffer.alloc(64 * KIB))
  varve('disk', 'add', 'usual', usual, '-f', 'raw')
  const modes = (): string[] =>
    ['none', 'unsafe', 'writeback', 'usual'].map(
      (disk) => /^cache: (.*)$/m.exec(varve('disk', 'show', disk))?.[1] ?? '',
    )
  assert.deepEqual(modes(), ['none', 'unsafe', 'writeback', 'writeback'])
  const { uri } = await daemon.api.call('showDisk', { disk: 'none' }, {})
  assert.ok(uri !== undefined)
  const guest = await connectNbd(uri, { reconnectMs: 20_000 })
  const written = Buffer.alloc(9 * KIB, 5)
  await guest.write(512, written.length, written, 0, 0)
  varve('snapshot', 'create', 'none', 'before')
  await guest.write(64 * KIB, written.length, written, 0, 0)
  await guest.flush()
  await daemon.kill()
  await daemon.start()
  assert.deepEqual(modes(), ['none', 'unsafe', 'writeback', 'writeback'])
  const read = Buffer.alloc(written.length)
  for (const at of [512, 64 * KIB]) {
    await guest.read(at, read.length, read.fill(0), 0)
    assert.ok(read.equals(written), `what was written at ${at}`)
  }
  await guest.close()
  await daemon.stop()
  for (const image of images) assertClean(image, 'after the daemon ended')
  assert.match(
    fs.readFileSync(path.join(folder, 'daemon.log'), 'utf8'),
    /unsafe: with --cache unsafe a flush does nothing/,
  )
})
