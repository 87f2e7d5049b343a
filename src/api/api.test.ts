// The border of the API: every kind of error survives the way from the engine through HTTP to the client, with its message.

import assert from 'node:assert/strict'
import path from 'node:path'
import { type TestContext, test } from 'node:test'
import { BlockError, ERROR_KINDS, isBlockError } from '../block/error.ts'
import type { EngineService } from '../engine/service.ts'
import { Job, type JobStatus } from '../job/job.ts'
import { tempFolder } from '../../test/support/temp.ts'
import { ApiClient } from './client.ts'
import { makeServer } from './server.ts'
import { HTTP_STATUS } from './status-codes.ts'

/** A server over an engine of which only what is given exists. */
async function serve(t: TestContext, engine: Partial<Record<keyof EngineService, unknown>>): Promise<ApiClient> {
  const server = await makeServer({ engine: engine as unknown as EngineService, version: '0', home: '/home' })
  t.after(() => server.close())
  const socket = path.join(tempFolder(t), 'api.sock')
  await server.listen({ path: socket })
  return new ApiClient(socket)
}

for (const kind of ERROR_KINDS) {
  test(`an error of kind ${kind} reaches the client as it is, by status ${HTTP_STATUS[kind]}`, async (t) => {
    const message = `disk "vm1": what is ${kind}, and what to do`
    const fail = (): never => {
      throw new BlockError(kind, message, { path: '/not/for/others' })
    }
    const api = await serve(t, { showDisk: fail, addDisk: async () => fail(), watchJob: () => () => {}, showJob: fail })
    const isSame = (error: unknown): boolean => isBlockError(error, kind) && error.message === message
    await assert.rejects(api.call('showDisk', { disk: 'vm1' }, {}), isSame)
    await assert.rejects(api.call('addDisk', {}, { name: 'vm1', image: '/i', format: 'raw' }), isSame)
    await assert.rejects(
      api.follow('job', () => undefined),
      isSame,
    )
  })
}

test('a job that pauses for good while its follower begins to watch it is seen to be paused', async (t) => {
  const running = new Job({ id: 'job', kind: 'mirror', subject: 'vm1' }).status
  let status: JobStatus = running
  let changed = (): void => {}
  let end = (_status: JobStatus): void => {}
  const api = await serve(t, {
    watchJob: async (_id: string, listener: () => void) => {
      changed = listener
      return () => {}
    },
    showJob: async () => {
      const then = status
      if (status.state !== 'paused') {
        status = { ...status, state: 'paused' }
        changed()
      }
      return then
    },
    jobEnded: () => new Promise<JobStatus>((resolve) => (end = resolve)),
  })
  const states: string[] = []
  await api.follow('job', ({ state }) => {
    states.push(state)
    if (state === 'paused') end({ ...running, state: 'concluded', endedMs: 1 })
  })
  assert.deepEqual(states, [running.state, 'paused', 'concluded'])
})

test('every kind has a status of failure', () => {
  assert.deepEqual(Object.keys(HTTP_STATUS).sort(), [...ERROR_KINDS].sort())
  for (const status of Object.values(HTTP_STATUS)) assert.ok(status >= 400 && status < 600)
})

test('an error that is none of Varve’s comes as kind io and says that it is internal', async (t) => {
  const api = await serve(t, {
    showDisk: () => {
      throw new TypeError('x is not a function')
    },
  })
  await assert.rejects(
    api.call('showDisk', { disk: 'vm1' }, {}),
    (error) => isBlockError(error, 'io') && error.message === 'internal error: x is not a function',
  )
})

test('a request of a wrong shape is an invalid argument that names the field', async (t) => {
  const api = await serve(t, {})
  await assert.rejects(
    api.call('addDisk', {}, { name: '', image: '/i', format: 'raw' }),
    (error) => isBlockError(error, 'invalid-argument') && error.message.includes('/name'),
  )
})

test('without a daemon the client says not-found and how to start one', async (t) => {
  const api = new ApiClient(path.join(tempFolder(t), 'api.sock'))
  await assert.rejects(
    api.call('listDisks', {}, {}),
    (error) => isBlockError(error, 'not-found') && /varve serve/.test(error.message),
  )
})
