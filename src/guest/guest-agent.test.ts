import assert from 'node:assert/strict'
import fs from 'node:fs'
import net from 'node:net'
import path from 'node:path'
import { type TestContext, test } from 'node:test'
import { type ErrorKind, isBlockError } from '../block/error.ts'
import { FakeAgent } from '../../test/support/fake-agent.ts'
import { tempFolder } from '../../test/support/temp.ts'
import { agentCall } from './guest-agent.ts'

async function agentOf(t: TestContext): Promise<FakeAgent> {
  const agent = await FakeAgent.listen(path.join(tempFolder(t), 'qga.sock'))
  t.after(() => agent.close())
  return agent
}

const never = new AbortController().signal

function refused(kind: ErrorKind, work: Promise<unknown>, says: RegExp): Promise<void> {
  return assert.rejects(work, (error) => isBlockError(error, kind) && says.test(error.message))
}

test('a guest is frozen and thawed', async (t) => {
  const agent = await agentOf(t)
  assert.equal(await agentCall(agent.socket, 'guest-fsfreeze-freeze', never), 2)
  assert.ok(agent.isFrozen)
  await agentCall(agent.socket, 'guest-fsfreeze-thaw', never)
  assert.ok(!agent.isFrozen)
  assert.deepEqual(agent.asked, ['guest-fsfreeze-freeze', 'guest-fsfreeze-thaw'])
})

test('what an earlier client left on the line is passed over, a synchronization that is not ours too', async (t) => {
  const agent = await agentOf(t)
  agent.stale = '{"return": 7}\n{"ret'
  assert.equal(await agentCall(agent.socket, 'guest-fsfreeze-freeze', never), 2)
})

test('the recorded answers of an agent are understood', async (t) => {
  const socket = path.join(tempFolder(t), 'qga.sock')
  // As qemu-ga 7.2 writes them; the first is of a client that went away.
  const server = net.createServer((client) => {
    client.once('data', (data) => {
      const id = /"id":(\d+)/.exec(data.toString('latin1'))?.[1]
      client.write(Buffer.from(`\xff{"return": 1234}\n\xff{"return": ${id}}\n`, 'latin1'))
      client.once('data', () => client.write('{"return": "thawed"}\n'))
    })
    client.on('error', () => {})
  })
  await new Promise<void>((resolve) => server.listen(socket, resolve))
  t.after(() => server.close())
  assert.equal(await agentCall(socket, 'guest-fsfreeze-status', never), 'thawed')
})

test('an agent that refuses, hangs up, says nothing or is not there is an error that says so', async (t) => {
  const agent = await agentOf(t)
  const freeze = (signal = never): Promise<unknown> => agentCall(agent.socket, 'guest-fsfreeze-freeze', signal)
  agent.manners['guest-fsfreeze-freeze'] = 'fail'
  await refused('io', freeze(), /refuses guest-fsfreeze-freeze: .*no such file system/)
  agent.manners['guest-fsfreeze-freeze'] = 'hang up'
  await refused('io', freeze(), /hung up/)
  agent.manners['guest-fsfreeze-freeze'] = 'silent'
  const patience = new AbortController()
  const silent = freeze(patience.signal)
  await agent.heard(3)
  patience.abort()
  await refused('timeout', silent, /did not answer in time/)
  await refused('not-found', agentCall(`${agent.socket}.none`, 'guest-fsfreeze-thaw', never), /ENOENT/)
  fs.writeFileSync(`${agent.socket}.file`, '')
  await assert.rejects(agentCall(`${agent.socket}.file`, 'guest-fsfreeze-thaw', never))
})

test('an agent that talks without end, or not in JSON, is a breach of the protocol', async (t) => {
  for (const [talk, says] of [
    [`\xff${'x'.repeat(100_000)}`, /says too much/],
    ['\xffno JSON\n', /did not answer in JSON/],
  ] as const) {
    const socket = path.join(tempFolder(t), 'qga.sock')
    const server = net.createServer((client) => void client.on('error', () => {}).write(Buffer.from(talk, 'latin1')))
    await new Promise<void>((resolve) => server.listen(socket, resolve))
    t.after(() => server.close())
    await refused('protocol', agentCall(socket, 'guest-fsfreeze-thaw', never), says)
  }
})
