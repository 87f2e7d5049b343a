import assert from 'node:assert/strict'
import path from 'node:path'
import { test } from 'node:test'
import { isBlockError } from '../../src/block/error.ts'
import { QmpClient } from '../../src/source/qemu/qmp-client.ts'
import { missing } from '../support/peer.ts'
import { QemuMachine } from '../support/qemu-machine.ts'
import { tempFolder } from '../support/temp.ts'

const skip = missing('qemu-system-x86_64')

test('QEMU answers, refuses, tells events, and comes back after its client went away', { skip }, async (t) => {
  const machine = await QemuMachine.start(t, [])
  const client = await QmpClient.open(machine.qmp)
  t.after(() => client.close())
  assert.ok(client.version.major >= 7)
  assert.ok(client.hasOob)
  const schema = (await client.execute('query-qmp-schema')) as unknown[]
  assert.ok(schema.length > 1000)
  await assert.rejects(client.execute('no-such-command'), (error) => isBlockError(error, 'unsupported'))
  await assert.rejects(client.execute('blockdev-del', { 'node-name': 'none' }), (error) => isBlockError(error, 'io'))
  const heard: string[] = []
  client.watch(({ event }) => heard.push(event))
  await client.execute('cont')
  await client.execute('stop')
  assert.deepEqual(heard, ['RESUME', 'STOP'])
  client.close()
  const again = await QmpClient.open(machine.qmp)
  t.after(() => again.close())
  assert.deepEqual(((await again.execute('query-status')) as { status: string }).status, 'paused')
  await machine.stop()
  await assert.rejects(again.execute('query-status'), (error) => isBlockError(error))
  await assert.rejects(again.execute('query-status'), (error) => isBlockError(error, 'not-found'))
})

test('a monitor that another client has, and a human monitor, are errors that say so', { skip }, async (t) => {
  const human = path.join(tempFolder(t), 'hmp.sock')
  const machine = await QemuMachine.start(t, [], { args: ['-monitor', `unix:${human},server=on,wait=off`] })
  const first = await QmpClient.open(machine.qmp)
  t.after(() => first.close())
  await assert.rejects(QmpClient.open(machine.qmp, { greetingMs: 100 }), /talks to one at a time/)
  await assert.rejects(QmpClient.open(human), (error) => isBlockError(error, 'protocol'))
})
