// The suite that every ObjectStore runs: it is the specification of src/repository/store.ts.

import assert from 'node:assert/strict'
import { suite, test, type TestContext } from 'node:test'
import { Random } from '../../src/base/random.ts'
import { isBlockError } from '../../src/block/error.ts'
import type { ObjectStore } from '../../src/repository/store.ts'

export type MakeStore = (t: TestContext) => Promise<ObjectStore>

async function failsWith(kind: string, work: () => Promise<unknown>, names: string): Promise<void> {
  await assert.rejects(work, (error) => isBlockError(error) && error.kind === kind && error.message.includes(names))
}

const bytes = (text: string): Uint8Array => Buffer.from(text)

export function storeContract(name: string, make: MakeStore): void {
  suite(`${name} keeps the contract of an object store`, () => {
    test(`${name}: an object holds its parts one after the other, whole and in ranges`, async (t) => {
      const store = await make(t)
      const random = new Random(3)
      const parts = [1, 0, 70_000, 3_000_000, 17].map((length) => random.fill(Buffer.alloc(length)))
      const whole = Buffer.concat(parts)
      await store.put('packs/abc', parts)
      assert.deepEqual(Buffer.from(await store.get('packs/abc')), whole)
      assert.equal((await store.status('packs/abc'))?.size, whole.length)
      for (const [offset, length] of [
        [0, 1],
        [1, 70_000],
        [70_000, 1_500_000],
        [whole.length - 17, 17],
        [whole.length, 0],
      ] as const) {
        const range = await store.getRange('packs/abc', offset, length)
        assert.deepEqual(Buffer.from(range), whole.subarray(offset, offset + length))
      }
    })

    test(`${name}: an empty object is an object`, async (t) => {
      const store = await make(t)
      await store.put('empty', [])
      assert.equal((await store.get('empty')).length, 0)
      assert.equal((await store.status('empty'))?.size, 0)
    })

    test(`${name}: a second put of a name fails as existing and changes nothing`, async (t) => {
      const store = await make(t)
      await store.put('config', [bytes('first')])
      await failsWith('exists', () => store.put('config', [bytes('second, longer')]), 'config')
      assert.equal(Buffer.from(await store.get('config')).toString(), 'first')
      assert.deepEqual(await store.list(''), ['config'])
    })

    test(`${name}: of many puts of one name at once exactly one succeeds, and its content stays`, async (t) => {
      const store = await make(t)
      const puts = Array.from({ length: 8 }, (_, i) => store.put('packs/same', [bytes(`content ${i}`)]))
      const outcomes = await Promise.allSettled(puts)
      const winners = outcomes.flatMap((outcome, i) => (outcome.status === 'fulfilled' ? [i] : []))
      assert.equal(winners.length, 1)
      for (const outcome of outcomes) {
        if (outcome.status === 'rejected') assert.ok(isBlockError(outcome.reason, 'exists'))
      }
      assert.equal(Buffer.from(await store.get('packs/same')).toString(), `content ${winners[0]}`)
    })

    test(`${name}: what is not there is not found, and has no status`, async (t) => {
      const store = await make(t)
      await failsWith('not-found', () => store.get('packs/none'), 'packs/none')
      await failsWith('not-found', () => store.getRange('packs/none', 0, 1), 'packs/none')
      assert.equal(await store.status('packs/none'), undefined)
    })

    test(`${name}: a range past the end of its object is refused, never shortened or filled`, async (t) => {
      const store = await make(t)
      await store.put('packs/short', [bytes('0123456789')])
      await failsWith('out-of-range', () => store.getRange('packs/short', 5, 6), 'packs/short')
      await failsWith('out-of-range', () => store.getRange('packs/short', 11, 0), 'packs/short')
    })

    test(`${name}: a list has the keys of its prefix, sorted, and all of them without one`, async (t) => {
      const store = await make(t)
      assert.deepEqual(await store.list(''), [])
      assert.deepEqual(await store.list('packs/'), [])
      for (const key of ['packs/b', 'config', 'packs/a', 'index/z', 'packs/a-1']) await store.put(key, [bytes(key)])
      assert.deepEqual(await store.list('packs/'), ['packs/a', 'packs/a-1', 'packs/b'])
      assert.deepEqual(await store.list('index/'), ['index/z'])
      assert.deepEqual((await store.list('')).sort(), ['config', 'index/z', 'packs/a', 'packs/a-1', 'packs/b'])
    })

    test(`${name}: a later object is not older than an earlier one, by the store's clock`, async (t) => {
      const store = await make(t)
      await store.put('sessions/a', [bytes('a')])
      await store.put('sessions/b', [bytes('b')])
      const [a, b] = [await store.status('sessions/a'), await store.status('sessions/b')]
      assert.ok(a !== undefined && b !== undefined && a.createdMs <= b.createdMs)
    })

    test(`${name}: what was put and taken away before a list is in it and not, whatever happens meanwhile`, async (t) => {
      const store = await make(t)
      for (let i = 0; i < 40; i++) await store.put(`packs/stays-${i}`, [bytes('x')])
      for (let i = 0; i < 10; i++) await store.put(`packs/gone-${i}`, [bytes('x')])
      for (let i = 0; i < 10; i++) await store.remove(`packs/gone-${i}`)
      const busy = (async () => {
        for (let i = 0; i < 30; i++) {
          await store.put(`packs/comes-${i}`, [bytes('x')])
          await store.remove(`packs/comes-${i}`)
        }
      })()
      for (let i = 0; i < 5; i++) {
        const keys = await store.list('packs/')
        assert.equal(keys.filter((key) => key.startsWith('packs/stays-')).length, 40)
        assert.equal(keys.filter((key) => key.startsWith('packs/gone-')).length, 0)
      }
      await busy
    })

    test(`${name}: a removed object is gone, its name is free, and removing it again is harmless`, async (t) => {
      const store = await make(t)
      await store.put('backups/x', [bytes('old')])
      await store.remove('backups/x')
      await store.remove('backups/x')
      assert.deepEqual(await store.list('backups/'), [])
      await failsWith('not-found', () => store.get('backups/x'), 'backups/x')
      await store.put('backups/x', [bytes('new')])
      assert.equal(Buffer.from(await store.get('backups/x')).toString(), 'new')
    })

    test(`${name}: what it gives is the caller's, and what it was given too`, async (t) => {
      const store = await make(t)
      const given = Buffer.from('given')
      await store.put('config', [given])
      given.fill(0)
      const got = await store.get('config')
      got.fill(1)
      assert.equal(Buffer.from(await store.get('config')).toString(), 'given')
    })
  })
}
