import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { failsWith } from '../../../test/support/backups.ts'
import { FaultStore, type StoreFault } from '../../../test/support/fault-store.ts'
import { STORE_RETRY_MS } from '../../base/limits.ts'
import { BlockError } from '../../block/error.ts'
import type { ObjectStore } from '../store.ts'
import { MemoryStore } from './memory.ts'
import { RetryingStore } from './retrying.ts'

const bytes = (text: string): Uint8Array => Buffer.from(text)

/** A store whose first request goes wrong, and how long was slept over it. */
function withFault(fault: StoreFault, inner: ObjectStore = new MemoryStore()) {
  const faulty = new FaultStore(inner)
  Object.assign(faulty, { fault, faultAt: 1 })
  const slept: number[] = []
  const sleep = async (delayMs: number): Promise<void> => void slept.push(delayMs)
  return { store: new RetryingStore(faulty, { sleep }), faulty, slept }
}

suite('retrying store', () => {
  test('what fails once is done at the second try, whatever it is', async () => {
    const inner = new MemoryStore()
    await inner.put('packs/a', [bytes('content')])
    const works: readonly ((store: ObjectStore) => Promise<unknown>)[] = [
      (store) => store.put('packs/b', [bytes('other')]),
      (store) => store.get('packs/a'),
      (store) => store.getRange('packs/a', 1, 2),
      (store) => store.status('packs/a'),
      (store) => store.list('packs/'),
      (store) => store.remove('packs/a'),
    ]
    for (const work of works) {
      const { store, faulty, slept } = withFault('fails', inner)
      await work(store)
      assert.equal(faulty.requests, 2)
      assert.deepEqual(slept, STORE_RETRY_MS.slice(0, 1))
    }
    assert.deepEqual(await inner.list(''), ['packs/b'])
  })

  test('a put that was done and not answered is done', async () => {
    const { store } = withFault('unanswered')
    await store.put('config', [bytes('con'), bytes('tent')])
    assert.equal(Buffer.from(await store.get('config')).toString(), 'content')
  })

  test('a put that finds another’s object is refused, at the first try and at a later one', async () => {
    const inner = new MemoryStore()
    await inner.put('config', [bytes('theirs')])
    await failsWith('exists', () => new RetryingStore(inner).put('config', [bytes('theirs')]), /config/)
    const { store } = withFault('fails', inner)
    await failsWith('exists', () => store.put('config', [bytes('ours')]), /config/)
    assert.equal(Buffer.from(await inner.get('config')).toString(), 'theirs')
  })

  test('it gives up at last, and at once where trying again is no use', async () => {
    class Gone extends MemoryStore {
      asked = 0
      readonly #error: BlockError
      constructor(error: BlockError) {
        super()
        this.#error = error
      }
      override async list(): Promise<string[]> {
        this.asked++
        throw this.#error
      }
    }
    const sleep = async (): Promise<void> => undefined
    for (const [kind, times] of [
      ['io', STORE_RETRY_MS.length + 1],
      ['timeout', STORE_RETRY_MS.length + 1],
      ['no-space', 1],
      ['permission', 1],
      ['corrupt', 1],
    ] as const) {
      const gone = new Gone(new BlockError(kind, 'it does not answer'))
      await failsWith(kind, () => new RetryingStore(gone, { sleep }).list(''), /does not answer/)
      assert.equal(gone.asked, times)
    }
  })
})
