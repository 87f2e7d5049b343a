import assert from 'node:assert/strict'
import { test } from 'node:test'
import { isBlockError } from '../block/error.ts'
import type { Host } from '../host/host.ts'
import { MemoryCatalog } from './catalog.ts'
import { DistantGuests, settleGuest } from './distant-guests.ts'

const DISK = { id: '1', name: 'vm1', layers: [], addedMs: 0, nextOverlay: 1 }

async function makeCatalog(): Promise<MemoryCatalog> {
  const catalog = new MemoryCatalog()
  await catalog.commit([{ put: 'disk', record: DISK }])
  return catalog
}

function guestsOf(catalog: MemoryCatalog, bootId: string): DistantGuests {
  return new DistantGuests(catalog, (changes) => catalog.commit(changes), bootId)
}

/** Opens the disk as an engine does; returns what was reported. */
async function open(catalog: MemoryCatalog, bootId: string, isClean: boolean): Promise<string[]> {
  const reports: string[] = []
  const host = { bootId: () => bootId } as Host
  await settleGuest({ catalog, host, report: (message) => reports.push(message) }, DISK, isClean)
  return reports
}

for (const { what, entered, boot, isClean, isHeld } of [
  { what: 'the process died', entered: true, boot: 'one', isClean: false, isHeld: false },
  { what: 'the host stopped uncleanly', entered: true, boot: 'two', isClean: false, isHeld: true },
  { what: 'it was closed cleanly and the host started anew', entered: true, boot: 'two', isClean: true, isHeld: false },
  { what: 'no client was on TCP', entered: false, boot: 'two', isClean: false, isHeld: false },
]) {
  test(`a disk is ${isHeld ? 'held' : 'served'} on TCP when ${what}`, async () => {
    const catalog = await makeCatalog()
    if (entered) await guestsOf(catalog, 'one').enters('vm1')
    const reports = await open(catalog, boot, isClean)
    assert.equal(guestsOf(catalog, boot).refusal('vm1') !== undefined, isHeld)
    assert.equal(reports.length, isHeld ? 1 : 0)
    if (isClean) assert.equal(catalog.get('guest', '1'), undefined)
  })
}

test('a held disk stays so, whatever happens to daemon and host, until it is released', async () => {
  const catalog = await makeCatalog()
  await guestsOf(catalog, 'one').enters('vm1')
  for (const [boot, isClean] of [
    ['two', false],
    ['two', true],
    ['three', true],
  ] as const) {
    assert.match((await open(catalog, boot, isClean)).join(), /varve disk release vm1/)
    assert.match(guestsOf(catalog, boot).refusal('vm1') ?? '', /the host stopped uncleanly/)
  }
  const guests = guestsOf(catalog, 'three')
  await guests.release('vm1')
  assert.equal(guests.refusal('vm1'), undefined)
  await assert.rejects(guests.release('vm1'), (error) => isBlockError(error, 'invalid-argument'))
})

test('a client is noted once for each boot, and all who come meanwhile wait for that', async () => {
  const catalog = await makeCatalog()
  let commits = 0
  const written = Promise.withResolvers<void>()
  const guests = new DistantGuests(
    catalog,
    async (changes) => {
      commits++
      await written.promise
      await catalog.commit(changes)
    },
    'one',
  )
  const waiting = [guests.enters('vm1'), guests.enters('vm1')]
  assert.ok(waiting.every((pending) => pending !== undefined))
  assert.equal(catalog.get('guest', '1'), undefined)
  written.resolve()
  await Promise.all(waiting)
  assert.equal(guests.enters('vm1'), undefined)
  assert.equal(guests.enters('vm1@snapshot'), undefined)
  assert.equal(commits, 1)
  await guestsOf(catalog, 'two').enters('vm1')
  assert.equal(catalog.get('guest', '1')?.bootId, 'two')
})
