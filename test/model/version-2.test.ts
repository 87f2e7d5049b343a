// A disk on an image of version 2 of qcow2, which has no dirty bit: it serves, is snapshot and merged as any other, says once
// what is different, and a death of the process leaves leaks alone.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { Random } from '../../src/base/random.ts'
import { createQcow2 } from '../../src/format/qcow2/create.ts'
import { openQcow2 } from '../../src/format/qcow2/image.ts'
import type { SimulatedHost } from '../../src/host/simulated.ts'
import { Lab, readWhole } from '../support/lab.ts'

const SIZE = 1024 * 1024
const BASE = '/images/old'

/** Writes pieces at random to the disk and to what it must hold. */
async function churn(lab: Lab, model: Buffer, random: Random): Promise<void> {
  const guest = lab.guest('old')
  for (let i = 0; i < 40; i++) {
    const bytes = random.fill(Buffer.alloc(5000))
    const offset = random.below(SIZE - bytes.length)
    await guest.write(offset, bytes.length, bytes, 0, 0)
    model.set(bytes, offset)
    if (i % 10 === 9) await guest.flush()
  }
}

async function check(host: SimulatedHost): Promise<[corruptions: number, leaks: number]> {
  const image = await openQcow2(host, BASE, { name: 'old' })
  const { corruptions, leaks } = await image.check()
  await image.close()
  return [corruptions, leaks]
}

test('an image of version 2 serves as a disk, through a snapshot, a kill and a merge into it', async () => {
  const lab = await Lab.create()
  await createQcow2(lab.host, BASE, { size: SIZE, clusterSize: 4096, version: 2 })
  const random = new Random(1)
  const model = Buffer.alloc(SIZE)
  const added = await lab.engine.addDisk('old', BASE, 'qcow2')
  assert.match(added.note ?? '', /version 2 .*qemu-img amend -f qcow2 -o compat=1\.1 \/images\/old/)
  assert.equal(lab.engine.showDisk('old').note, undefined)
  await churn(lab, model, random)
  await lab.engine.createSnapshot('old', 'before')
  await churn(lab, model, random)
  lab.host.killProcess()
  assert.equal((await check(lab.host))[0], 0)
  await lab.start()
  assert.ok((await readWhole(lab.guest('old'))).equals(model))
  await lab.engine.commit('old')
  await lab.jobsEnd()
  await churn(lab, model, random)
  assert.ok((await readWhole(lab.guest('old'))).equals(model))
  await lab.stop()
  assert.deepEqual(await check(lab.host), [0, 0])
})

test('of an image of version 3 there is nothing to note', async () => {
  const lab = await Lab.create()
  await createQcow2(lab.host, '/images/new', { size: SIZE })
  assert.equal((await lab.engine.addDisk('new', '/images/new', 'qcow2')).note, undefined)
  await lab.stop()
})
