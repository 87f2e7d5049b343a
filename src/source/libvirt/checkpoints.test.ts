import assert from 'node:assert/strict'
import { test } from 'node:test'
import { recordedVirsh } from '../../../test/support/recorded-virsh.ts'
import { checkpointDisks, checkpointXml, deleteCheckpoint, readCheckpoints } from './checkpoints.ts'

const NAME = 'varve-web-5d0c4e2a-20261123T224403000Z-1a2b3c4d'
const whole = new Set(['vda'])
const none = new Set()

test('a checkpoint knows of which disks, and whether their bitmaps are whole', async () => {
  const all = (): boolean => true
  assert.deepEqual(await readCheckpoints(recordedVirsh(), all), [])
  assert.deepEqual(await readCheckpoints(recordedVirsh('a backup job is at work'), () => false), [])
  const [found, ...others] = await readCheckpoints(recordedVirsh('a backup job is at work'), all)
  assert.deepEqual([found, others], [{ name: NAME, whole, broken: none }, []])
})

test('after a kill of QEMU its bitmap is broken', async () => {
  const virsh = recordedVirsh('QEMU was killed')
  const said = await virsh.ask('checkpoint-dumpxml', ['--checkpointname', NAME, '--size', '--no-domain'])

  assert.deepEqual(checkpointDisks(said), { whole: none, broken: whole })
})

test('a checkpoint whose bitmap is gone is deleted all the same', async () => {
  const asked: string[] = []
  await deleteCheckpoint(recordedVirsh('QEMU was killed', asked), NAME)
  const command = `checkpoint-delete --checkpointname ${NAME}`
  assert.deepEqual(asked, [command, `${command} --metadata`])
})

test('a checkpoint names all disks, and marks those that it is of', () => {
  assert.equal(
    checkpointXml('web', ['vda', 'vdb'], new Set(['vdb'])),
    "<domaincheckpoint><name>web</name><disks><disk name='vda' checkpoint='no'/><disk name='vdb' checkpoint='bitmap'/></disks></domaincheckpoint>",
  )
})
