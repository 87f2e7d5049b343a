import assert from 'node:assert/strict'
import { test } from 'node:test'
import { GUESTS_IDLE_MS } from '../base/limits.ts'
import { ThreadGuests } from './thread-guests.ts'

test('guests are idle when they have asked for nothing for a while', () => {
  const guests = new ThreadGuests()
  assert.ok(guests.areIdle(GUESTS_IDLE_MS))
  guests.requests++
  assert.ok(!guests.areIdle(1000))
  assert.ok(!guests.areIdle(1000 + GUESTS_IDLE_MS - 1))
  assert.ok(guests.areIdle(1000 + GUESTS_IDLE_MS))
})

test('a request begins the while anew, from when it is seen', () => {
  const guests = new ThreadGuests()
  guests.requests++
  guests.areIdle(1000)
  guests.requests++
  assert.ok(!guests.areIdle(1000 + GUESTS_IDLE_MS))
  assert.ok(guests.areIdle(1000 + 2 * GUESTS_IDLE_MS))
})
