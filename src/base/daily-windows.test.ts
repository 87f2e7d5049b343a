import assert from 'node:assert/strict'
import { test } from 'node:test'
import { DailyWindows } from './daily-windows.ts'

const at = (text: string): number => new Date(`2026-03-10T${text}:00`).getTime()

function windows(...texts: string[]): DailyWindows {
  const parsed = DailyWindows.parse(texts)
  assert.ok(parsed !== undefined)
  return parsed
}

const CASES: readonly [texts: string[], moment: string, isOpen: boolean][] = [
  [[], '12:00', true],
  [['09:00-17:00'], '08:59', false],
  [['09:00-17:00'], '09:00', true],
  [['09:00-17:00'], '16:59', true],
  [['09:00-17:00'], '17:00', false],
  [['22:00-06:00'], '23:30', true],
  [['22:00-06:00'], '05:59', true],
  [['22:00-06:00'], '06:00', false],
  [['22:00-24:00'], '23:59', true],
  [['22:00-24:00'], '00:00', false],
  [['00:00-24:00'], '12:00', true],
  [['01:00-02:00', '12:00-13:00'], '12:30', true],
  [['01:00-02:00', '12:00-13:00'], '11:30', false],
]

for (const [texts, moment, isOpen] of CASES)
  test(`at ${moment}, ${texts.join(' and ') || 'no window'} is ${isOpen ? 'open' : 'closed'}`, () => {
    assert.equal(windows(...texts).isOpen(at(moment)), isOpen)
  })

test('the next opening is today or tomorrow, of whichever window comes first', () => {
  const both = windows('22:00-06:00', '12:00-13:00')
  assert.equal(both.nextOpening(at('11:00')), at('12:00'))
  assert.equal(both.nextOpening(at('12:00')), at('22:00'))
  const tomorrow = new Date(2026, 2, 11, 12).getTime()
  assert.equal(both.nextOpening(at('22:00')), tomorrow)
  assert.equal(windows().nextOpening(at('22:00')), undefined)
})

test('what is no window is not taken for one', () => {
  for (const text of ['', '22-06', '25:00-06:00', '22:00-24:01', '22:60-06:00', '24:00-06:00', '22:00', 'night'])
    assert.equal(DailyWindows.parse([text]), undefined, text)
})
