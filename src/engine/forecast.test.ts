import assert from 'node:assert/strict'
import { test } from 'node:test'
import { type BackupFigures, expectedScratch, learn } from './forecast.ts'

const MIB = 1024 * 1024
const HOUR = 3_600_000

const full: BackupFigures = { momentMs: 0, tookMs: 10_000, copiedBytes: 1000 * MIB, savedBytes: 20 * MIB, full: true }

test('a machine that was never backed up is expected to take nothing', () => {
  assert.equal(expectedScratch(undefined, 0, false), 0)
})

test('after a full, the next full takes what guests change while as much is copied', () => {
  const known = learn('vm1', undefined, full)
  assert.equal(known.writeRate, 2 * MIB)
  assert.equal(known.copyRate, 100 * MIB)
  assert.equal(expectedScratch(known, HOUR, true), 20 * MIB)
})

test('an incremental takes more the longer the last backup is ago, and never more than a full', () => {
  const known = learn('vm1', undefined, full)
  const after = (ms: number): number => expectedScratch(known, ms, false)
  assert.equal(after(100_000), 4 * MIB)
  assert.ok(after(100_000) < after(200_000))
  assert.equal(after(100 * HOUR), expectedScratch(known, HOUR, true))
  assert.equal(after(-1000), 0)
})

test('a machine that writes more is known for that at once, and one that writes less by and by', () => {
  const first = learn('vm1', undefined, full)
  const figures = { momentMs: 100_000, tookMs: 10_000, savedBytes: 0, full: false }
  const busier = learn('vm1', first, { ...figures, copiedBytes: 800 * MIB })
  assert.equal(busier.writeRate, 8 * MIB)
  const calmer = learn('vm1', busier, { ...figures, momentMs: 200_000, copiedBytes: 200 * MIB })
  assert.equal(calmer.writeRate, 5 * MIB)
  assert.equal(calmer.fullBytes, 1000 * MIB)
})

test('a guest that changes faster than is copied takes no more than what is to do', () => {
  const known = learn('vm1', undefined, { ...full, savedBytes: 1000 * MIB, tookMs: 1000, copiedBytes: 1000 * MIB })
  assert.equal(expectedScratch(known, HOUR, true), 1000 * MIB)
})
