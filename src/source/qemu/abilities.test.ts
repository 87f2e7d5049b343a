import assert from 'node:assert/strict'
import path from 'node:path'
import { type TestContext, test } from 'node:test'
import { FakeMonitor, GREETING } from '../../../test/support/fake-monitor.ts'
import { tempFolder } from '../../../test/support/temp.ts'
import { isBlockError } from '../../block/error.ts'
import { checkAbilities } from './abilities.ts'
import { QmpClient } from './qmp-client.ts'

const COMMANDS = [
  'blockdev-add',
  'blockdev-reopen',
  'block-export-add',
  'block-dirty-bitmap-merge',
  'x-debug-query-block-graph',
]

/** A schema as QEMU prints it: its types have numbers for names. */
function schema(commands: readonly string[], drivers: Readonly<Record<string, readonly string[]>>): object[] {
  const names = Object.keys(drivers)
  return [
    ...commands.map((name) => ({ name, 'meta-type': 'command', 'arg-type': name === 'blockdev-add' ? '1' : '0' })),
    { name: '0', 'meta-type': 'object', members: [] },
    {
      name: '1',
      'meta-type': 'object',
      members: [{ name: 'driver', type: '2' }],
      variants: names.map((name, index) => ({ case: name, type: String(10 + index) })),
    },
    ...names.map((name, index) => ({
      name: String(10 + index),
      'meta-type': 'object',
      members: drivers[name]?.map((member) => ({ name: member, type: '0' })),
    })),
  ]
}

/** A monitor of that version with that schema. */
async function monitorOf(t: TestContext, minor: string, entities: readonly object[]): Promise<QmpClient> {
  const monitor = await FakeMonitor.listen(path.join(tempFolder(t), 'qmp'), () => entities)
  monitor.greeting = GREETING.replace(/"minor": 2, "major": 7/, minor)
  t.after(() => monitor.close())
  const client = await QmpClient.open(monitor.socket)
  t.after(() => client.close())
  return client
}

const FILTER = ['target', 'bitmap', 'on-cbw-error', 'cbw-timeout']

const OLD = [
  {
    version: '5.2',
    greeting: '"minor": 2, "major": 5',
    entities: schema(
      COMMANDS.filter((name) => name !== 'blockdev-reopen'),
      { qcow2: [] },
    ),
    lacks: 'blockdev-reopen, snapshot-access, on-cbw-error, cbw-timeout',
  },
  {
    version: '6.2',
    greeting: '"minor": 2, "major": 6',
    entities: schema(COMMANDS, { qcow2: [], 'copy-before-write': ['target'] }),
    lacks: 'snapshot-access, on-cbw-error, cbw-timeout',
  },
  {
    version: '7.0',
    greeting: '"minor": 0, "major": 7',
    entities: schema(COMMANDS, { 'copy-before-write': ['target', 'bitmap'], 'snapshot-access': [] }),
    lacks: 'on-cbw-error, cbw-timeout',
  },
] as const

for (const { version, greeting, entities, lacks } of OLD)
  test(`a QEMU ${version} is refused by what it lacks, and which has that`, async (t) => {
    const client = await monitorOf(t, greeting, entities)
    await assert.rejects(checkAbilities(client), (error) => {
      assert.ok(isBlockError(error, 'unsupported'), String(error))
      assert.ok(error.message.endsWith(`is version ${version} and lacks ${lacks}: backups need QEMU 7.2 or newer`))
      return true
    })
  })

test('what an older QEMU has that was given all of it is good enough', async (t) => {
  const entities = schema(COMMANDS, { 'copy-before-write': FILTER, 'snapshot-access': [] })
  await checkAbilities(await monitorOf(t, '"minor": 2, "major": 6', entities))
})
