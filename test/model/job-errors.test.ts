// What an error of the storage means to a merge, by its policy, on whole engines on a simulated host: it ends and all is as before,
// or it pauses and goes on when it is resumed. Nothing is lost either way, also when it was a flush that failed.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { Random } from '../../src/base/random.ts'
import { BlockError, type ErrorKind, isBlockError } from '../../src/block/error.ts'
import type { ErrorPolicy, JobStatus } from '../../src/job/job.ts'
import type { HostOperation } from '../../src/host/simulated.ts'
import { Lab, readWhole } from '../support/lab.ts'

const SIZE = 1024 * 1024

interface Trial {
  readonly merge: 'commit' | 'stream'
  readonly policy: ErrorPolicy | undefined
  readonly kind: ErrorKind
  readonly at: HostOperation['kind']
  readonly pauses: boolean
}

// A failed sync of the active layer is the guest's affair too: that image refuses all flushes from then on.
const PLACES = [
  ['commit', 'write'],
  ['commit', 'sync'],
  ['stream', 'write'],
] as const

const TRIALS: readonly Trial[] = PLACES.flatMap(([merge, at]): Trial[] => [
  { merge, at, policy: undefined, kind: 'no-space', pauses: true },
  { merge, at, policy: undefined, kind: 'io', pauses: false },
  { merge, at, policy: 'report', kind: 'no-space', pauses: false },
  { merge, at, policy: 'stop', kind: 'io', pauses: true },
])

for (const { merge, policy, kind, at, pauses } of TRIALS) {
  test(`${merge}, policy ${policy ?? 'not said'}, ${kind} at a ${at}: it ${pauses ? 'pauses and goes on' : 'ends'}`, async () => {
    const lab = await Lab.create()
    const { engine } = lab
    await engine.createDisk('vm', '/images/vm.qcow2', 'qcow2', SIZE)
    const random = new Random(1)
    await lab.guest('vm').write(0, SIZE, random.fill(Buffer.alloc(SIZE)), 0, 0)
    await engine.createSnapshot('vm', 's')
    await lab.guest('vm').write(0, SIZE / 2, random.fill(Buffer.alloc(SIZE / 2)), 0, 0)
    await lab.guest('vm').flush()
    const content = await readWhole(lab.guest('vm'))
    const target = merge === 'commit' ? '/images/vm.qcow2' : '/images/vm.varve-1.qcow2'
    let after = 1
    lab.host.beforeOperation = (operation) => {
      if (operation.path !== target || operation.kind !== at) return
      if (at === 'write' && after-- > 0) return
      lab.host.beforeOperation = undefined
      throw new BlockError(kind, 'the storage says so')
    }
    const { id } = await engine[merge]('vm', undefined, undefined, 0, policy)
    const waiting = (): JobStatus => engine.showJob(id)
    while (waiting().endedMs === undefined && waiting().state !== 'paused')
      await new Promise((resolve) => setImmediate(resolve))
    assert.equal(waiting().error?.kind, kind)
    assert.equal(waiting().state, pauses ? 'paused' : 'concluded')
    assert.ok((await readWhole(lab.guest('vm'))).equals(content))
    if (pauses) {
      await engine.sayToJob(id, 'resume')
      assert.equal((await engine.jobEnded(id)).error, undefined)
    }
    assert.equal(engine.showDisk('vm').layers.length, pauses ? 1 : 2)
    assert.ok((await readWhole(lab.guest('vm'))).equals(content))
    // What was flushed survives the host, wherever it lies now.
    const fork = lab.fork('none')
    await fork.start()
    assert.ok((await readWhole(fork.guest('vm'))).equals(content))
    await fork.stop()
    await lab.stop()
  })
}

test('an ended job is dismissed, a running one is not', async () => {
  const lab = await Lab.create()
  const { engine } = lab
  await engine.createDisk('vm', '/images/vm.qcow2', 'qcow2', SIZE)
  await engine.createSnapshot('vm', 's')
  await lab.guest('vm').write(0, SIZE, Buffer.alloc(SIZE, 1), 0, 0)
  const { id } = await engine.commit('vm', undefined, undefined, 100_000)
  await assert.rejects(
    engine.dismissJob(id),
    (error) => isBlockError(error, 'busy') && /varve job cancel/.test(error.message),
  )
  await engine.setJobSpeed(id, 0)
  await engine.jobEnded(id)
  await engine.dismissJob(id)
  assert.deepEqual(engine.listJobs(), [])
  await assert.rejects(engine.dismissJob(id), (error) => isBlockError(error, 'not-found'))
  await lab.stop()
})
