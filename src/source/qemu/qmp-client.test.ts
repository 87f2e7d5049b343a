import assert from 'node:assert/strict'
import fs from 'node:fs'
import path from 'node:path'
import { type TestContext, test } from 'node:test'
import { QMP_COMMANDS_MAX, QMP_REPLY_MAX } from '../../base/qemu-limits.ts'
import { type ErrorKind, isBlockError } from '../../block/error.ts'
import { type Answer, FakeMonitor, SILENT } from '../../../test/support/fake-monitor.ts'
import { tempFolder } from '../../../test/support/temp.ts'
import { QmpClient, type QmpEvent, type QmpLimits } from './qmp-client.ts'
import { QmpLines } from './qmp-line.ts'

async function monitorOf(t: TestContext, answer: Answer = () => ({})): Promise<FakeMonitor> {
  const monitor = await FakeMonitor.listen(path.join(tempFolder(t), 'qmp.sock'), answer)
  t.after(() => monitor.close())
  return monitor
}

async function clientOf(t: TestContext, monitor: FakeMonitor, limits?: QmpLimits): Promise<QmpClient> {
  const client = await QmpClient.open(monitor.socket, limits)
  t.after(() => client.close())
  return client
}

function refused(kind: ErrorKind, work: Promise<unknown>, says: RegExp): Promise<void> {
  return assert.rejects(work, (error) => {
    assert.ok(isBlockError(error), String(error))
    assert.equal(error.kind, kind, error.message)
    assert.match(error.message, says)
    return true
  })
}

test('a client agrees on what the monitor offers, and gets each answer by its number', async (t) => {
  const held: (() => void)[] = []
  const monitor = await monitorOf(t, ({ execute, id }, client) => {
    if (execute !== 'slow') return execute.toUpperCase()
    held.push(() => client.write(`{"return": "SLOW", "id": ${id}}\n`))
    return SILENT
  })
  const client = await clientOf(t, monitor)
  assert.deepEqual(client.version, { major: 7, minor: 2, micro: 22 })
  assert.deepEqual(monitor.asked[0]?.arguments, { enable: ['oob'] })
  const slow = client.execute('slow')
  assert.equal(await client.execute('quick'), 'QUICK')
  for (const go of held) go()
  assert.equal(await slow, 'SLOW')
})

test('a command goes out of band only where the monitor offers that', async (t) => {
  const monitor = await monitorOf(t)
  const client = await clientOf(t, monitor)
  assert.ok(client.hasOob)
  await client.execute('migrate-pause', {}, { oob: true })
  assert.deepEqual(
    monitor.asked.map(({ isOob }) => isOob),
    [false, true],
  )
  const plain = await monitorOf(t)
  plain.greeting = plain.greeting.replace('"oob"', '')
  const other = await clientOf(t, plain)
  assert.deepEqual(plain.asked[0]?.arguments, {})
  await refused('unsupported', other.execute('migrate-pause', {}, { oob: true }), /out of band: migrate-pause/)
})

test('an error of each class is of its kind, and says what QEMU says', async (t) => {
  const monitor = await monitorOf(t, ({ execute, id }, client) => {
    client.write(`{"error": {"class": "${execute}", "desc": "no such thing"}, "id": ${id}}\n`)
    return SILENT
  })
  const client = await clientOf(t, monitor)
  const kinds: Record<string, ErrorKind> = {
    GenericError: 'io',
    CommandNotFound: 'unsupported',
    DeviceNotActive: 'closed',
    DeviceNotFound: 'not-found',
    KVMMissingCap: 'unsupported',
    Unheard: 'io',
  }
  for (const [name, kind] of Object.entries(kinds))
    await refused(kind, client.execute(name), new RegExp(`refuses ${name}: no such thing`))
})

test('events come in order, whatever is asked meanwhile, until nobody watches', async (t) => {
  const monitor = await monitorOf(t, ({ execute }, client) => {
    client.write(`{"event": "${execute}", "data": {"a": 1}, "timestamp": {}}\n`)
    return {}
  })
  const client = await clientOf(t, monitor)
  const heard: QmpEvent[] = []
  const stop = client.watch((event) => heard.push(event))
  await client.execute('ONE')
  await client.execute('TWO')
  stop()
  await client.execute('THREE')
  assert.deepEqual(heard, [
    { event: 'ONE', data: { a: 1 } },
    { event: 'TWO', data: { a: 1 } },
  ])
})

test('a command that is not answered in time has failed, and its late answer is nobody else’s', async (t) => {
  let late: (() => void) | undefined
  const monitor = await monitorOf(t, ({ execute, id }, client) => {
    if (execute !== 'slow') return 'mine'
    late = () => client.write(`{"return": "late", "id": ${id}}\n`)
    return SILENT
  })
  const client = await clientOf(t, monitor)
  await refused('timeout', client.execute('slow', {}, { limitMs: 20 }), /did not answer slow within 20 ms/)
  late?.()
  assert.equal(await client.execute('quick'), 'mine')
})

test('a lost connection fails what is under way, and comes back with the next command', async (t) => {
  const monitor = await monitorOf(t, ({ execute }, client) => {
    if (execute !== 'die') return 'alive'
    client.destroy()
    return SILENT
  })
  const client = await clientOf(t, monitor)
  await refused('closed', client.execute('die'), /hung up/)
  assert.equal(await client.execute('live'), 'alive')
  assert.equal(client.connections, 2)
  // Commands that ask for it at once share one connection.
  await refused('closed', client.execute('die'), /hung up/)
  assert.deepEqual(await Promise.all([client.execute('a'), client.execute('b')]), ['alive', 'alive'])
  assert.equal(client.connections, 3)
})

test('when the machine is gone the next command says so', async (t) => {
  const monitor = await monitorOf(t)
  const client = await clientOf(t, monitor)
  await monitor.close()
  // The first one may be on its way before the end is seen.
  await assert.rejects(client.execute('any'))
  await refused('not-found', client.execute('any'), /nobody listens/)
})

test('a client that is closed fails what is under way, and takes nothing more', async (t) => {
  const monitor = await monitorOf(t, () => SILENT)
  const client = await clientOf(t, monitor)
  const asked = refused('closed', client.execute('any'), /was closed/)
  await new Promise((resolve) => setImmediate(resolve))
  client.close()
  await asked
  await refused('closed', client.execute('more'), /was closed/)
})

test('what is no monitor is an error that says what it may be', async (t) => {
  const folder = tempFolder(t)
  await refused('not-found', QmpClient.open(path.join(folder, 'none')), /nobody listens at .*none/)
  fs.writeFileSync(path.join(folder, 'file'), 'x')
  await refused('not-found', QmpClient.open(path.join(folder, 'file')), /nobody listens at .*file/)
  await refused('invalid-argument', QmpClient.open(`/${'x'.repeat(200)}`), /at most/)
  const monitor = await monitorOf(t)
  const open = (greeting: string): Promise<QmpClient> => {
    monitor.greeting = greeting
    return QmpClient.open(monitor.socket, { greetingMs: 50 })
  }
  await refused('timeout', open(''), /talks to one at a time/)
  await refused('protocol', open('QEMU 7.2.22 monitor - type help'), /does not speak QMP: it said "QEMU 7.2.22 monitor/)
  await refused('protocol', open('{"return": 1}\n'), /does not speak QMP/)
  await refused('protocol', open('{"QMP" 1}\n'), /does not speak QMP/)
  await refused('protocol', open('\u0000\u0001\n'), /does not speak QMP/)
})

test('only so many commands are under way', async (t) => {
  const monitor = await monitorOf(t, () => SILENT)
  const client = await clientOf(t, monitor)
  const all = Array.from({ length: QMP_COMMANDS_MAX }, () => assert.rejects(client.execute('any')))
  await new Promise((resolve) => setImmediate(resolve))
  await refused('busy', client.execute('one more'), /wait for their answers/)
  client.close()
  await Promise.all(all)
})

test('lines are the same however they are cut, and have a bound', () => {
  const text = Buffer.from('{"a": 1}\r\n\r\n{"b": "ö"}\n{"c"')
  for (let cut = 0; cut <= text.length; cut++) {
    const lines = new QmpLines('x')
    const found = [...lines.take(text.subarray(0, cut)), ...lines.take(text.subarray(cut))]
    assert.deepEqual(found, [{ a: 1 }, { b: 'ö' }], `cut at ${cut}`)
  }
  const lines = new QmpLines('x')
  const piece = Buffer.alloc(2 ** 20, '{')
  assert.throws(
    () => {
      for (let bytes = 0; bytes <= QMP_REPLY_MAX; bytes += piece.length) Array.from(lines.take(piece))
    },
    (error) => isBlockError(error, 'protocol') && /a line of more than/.test(error.message),
  )
})
