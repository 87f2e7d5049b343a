// The border of the command line: every kind of error has its exit status.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { ERROR_KINDS, type ErrorKind } from '../block/error.ts'
import { EXIT_STATUS, portArgument, sizeArgument, table } from './context.ts'

/** What the exit statuses are for; what is in no list is a plain failure, 1. */
const KINDS_BY_STATUS: Readonly<Record<number, readonly ErrorKind[]>> = {
  2: ['invalid-argument', 'out-of-range'],
  3: ['not-found'],
  4: ['busy', 'exists'],
  5: ['corrupt', 'invalid-format'],
}

for (const kind of ERROR_KINDS) {
  const found = Object.entries(KINDS_BY_STATUS).find(([, kinds]) => kinds.includes(kind))?.[0]
  const status = Number(found ?? 1)
  test(`an error of kind ${kind} ends the command with status ${status}`, () => {
    assert.equal(EXIT_STATUS[kind], status)
  })
}

test('sizes and ports are taken as people write them, and nothing else is', () => {
  assert.equal(sizeArgument('1.5G'), 1.5 * 2 ** 30)
  assert.equal(sizeArgument('0'), 0)
  assert.equal(portArgument('10809'), 10_809)
  for (const text of ['', ' ', '-1', 'x', '1e3', '0x10', '4GG', '99999P'])
    assert.throws(() => sizeArgument(text), { kind: 'invalid-argument' })
  for (const text of ['', '-1', '65536', '1.5', 'x', '0x10'])
    assert.throws(() => portArgument(text), { kind: 'invalid-argument' })
})

test('a table’s columns are as wide as their widest cell, without blanks at the end', () => {
  const rows = [
    ['a', 'long cell', ''],
    ['longer', 'b', 'c'],
  ]
  assert.equal(table(['X', 'Y', 'Z'], rows), 'X       Y          Z\na       long cell\nlonger  b          c')
})
