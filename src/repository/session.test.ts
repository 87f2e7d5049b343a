import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { backUp, beginFull, initInline, noise, openInline, restore } from '../../test/support/backups.ts'
import { LEASE_BEAT_MS } from '../base/limits.ts'
import { Random } from '../base/random.ts'
import { newBackupId } from './manifest.ts'
import { listSessions, Session, type SessionPlace, settleSession } from './session.ts'
import { MemoryStore } from './stores/memory.ts'
import { PLAIN_VAULT } from './vault.ts'

const MINUTE = 60_000
const turns = async (): Promise<void> => {
  for (let i = 0; i < 20; i++) await new Promise((resolve) => setImmediate(resolve))
}

function placeWith(now: () => number): SessionPlace & { readonly store: MemoryStore } {
  return { store: new MemoryStore('memory', now), vault: PLAIN_VAULT, holder: 'somebody' }
}

suite('sessions', () => {
  test('a backup that takes hours is not given up while its client lives', async (t) => {
    t.mock.timers.enable({ apis: ['setInterval'] })
    let nowMs = 1_000_000
    const store = new MemoryStore('memory', () => nowMs)
    const repository = await initInline(store)
    const content = noise(new Random(1), 100_000)
    const old = await backUp(repository, content)
    const writer = await beginFull(repository, [{ name: 'sda', size: content.length }])
    await writer.disk(0).write(0, content.length, content, 0)
    const pruner = await openInline(store)
    await pruner.forget(old.id)
    for (let passed = 0; passed < 3 * 60 * MINUTE; passed += LEASE_BEAT_MS) {
      nowMs += LEASE_BEAT_MS
      t.mock.timers.tick(LEASE_BEAT_MS)
      await turns()
      assert.deepEqual((await pruner.prune()).fenced, [])
      // One beat at a time, beside the session itself.
      assert.equal((await store.list('sessions/')).length, 2)
    }
    const info = await writer.finish()
    assert.equal(info.storedBytes, 0)
    assert.deepEqual(await store.list('sessions/'), [])
    await pruner.prune()
    assert.ok((await restore(pruner, info.id)).equals(content))
  })

  test('others see what it is, what it knows, and for how long it was silent', async () => {
    let nowMs = 1000
    const place = placeWith(() => nowMs)
    const parents = [newBackupId(5)]
    const session = await Session.begin(place, { id: newBackupId(10), kind: 'backup', parents })
    nowMs += 500
    await session.sees(['marks/a'])
    nowMs += 70
    const [seen, ...rest] = await listSessions(place, nowMs)
    assert.deepEqual(rest, [])
    assert.ok(seen !== undefined)
    const { keys, ...what } = seen
    assert.equal(keys.length, 2)
    assert.deepEqual(what, {
      id: session.id,
      kind: 'backup',
      holder: 'somebody',
      parents,
      seen: ['marks/a'],
      silentMs: 70,
    })
    await session.end()
    assert.deepEqual(await listSessions(place, nowMs), [])
  })

  test('it lives until its time is over, and then is fenced once and for all', async () => {
    let nowMs = 0
    const place = placeWith(() => nowMs)
    const session = await Session.begin(place, { id: newBackupId(10), kind: 'backup' })
    session.abandon()
    await session.end()
    const settle = async (): Promise<string> => {
      const [seen] = await listSessions(place, nowMs)
      return seen === undefined ? 'gone' : settleSession(place, seen)
    }
    nowMs = 29 * MINUTE
    assert.equal(await settle(), 'live')
    nowMs = 31 * MINUTE
    assert.equal(await settle(), 'fenced')
    assert.equal(await settle(), 'gone')
    await assert.rejects(place.store.put(`backups/${session.id}`, []), { kind: 'exists' })
  })

  test('a session that cannot be read is waited for, and not for ever', async () => {
    let nowMs = 0
    const place = placeWith(() => nowMs)
    await place.store.put(`sessions/${newBackupId(10)}`, [Buffer.from('rubbish')])
    await place.store.put('sessions/nonsense', [Buffer.from('rubbish')])
    for (const [at, state] of [
      [0, 'live'],
      [31 * MINUTE, 'fenced'],
    ] as const) {
      nowMs = at
      const seen = await listSessions(place, nowMs)
      assert.equal(seen.length, 2)
      for (const session of seen) {
        assert.equal(session.kind, 'unreadable')
        assert.equal(await settleSession(place, session), state)
      }
    }
    assert.deepEqual(await place.store.list('sessions/'), [])
  })

  test('a store that fails a beat does not end the session', async (t) => {
    t.mock.timers.enable({ apis: ['setInterval'] })
    class Moody extends MemoryStore {
      fails = false
      override async put(key: string, parts: readonly Uint8Array[]): Promise<void> {
        if (this.fails) throw new Error('not now')
        return super.put(key, parts)
      }
    }
    const store = new Moody()
    const place: SessionPlace = { store, vault: PLAIN_VAULT, holder: 'somebody' }
    const session = await Session.begin(place, { id: newBackupId(10), kind: 'backup' })
    store.fails = true
    t.mock.timers.tick(LEASE_BEAT_MS)
    await turns()
    assert.equal((await store.list('sessions/')).length, 1)
    store.fails = false
    t.mock.timers.tick(LEASE_BEAT_MS)
    await turns()
    assert.equal((await store.list('sessions/')).length, 2)
    await session.end()
    assert.deepEqual(await store.list('sessions/'), [])
  })
})
