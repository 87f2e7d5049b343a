// The table of docs/internals/jobs.md says what the tables of job.ts say.

import assert from 'node:assert/strict'
import fs from 'node:fs'
import path from 'node:path'
import { test } from 'node:test'
import { type JobState, MOVES, VERBS, verbsIn } from './job.ts'
import { ERROR_POLICIES, TERMS } from './terms.ts'

const PAGE = path.join(import.meta.dirname, '..', '..', 'docs', 'internals', 'jobs.md')

/** The cells of the page's rows that begin with a word in backticks, by that word. */
function rowsOf(section: string): Map<string, string[]> {
  const text =
    fs
      .readFileSync(PAGE, 'utf8')
      .split(/^## /m)
      .find((part) => part.startsWith(section)) ?? ''
  const lines = text.split('\n').filter((line) => line.startsWith('| `') && !line.includes('--on-error'))
  return new Map(
    lines.map((line) => {
      const [name = '', ...cells] = line
        .split('|')
        .slice(1, -1)
        .map((cell) => cell.trim())
      return [name.replaceAll('`', ''), cells]
    }),
  )
}

test('the page has every state with its next states and verbs, and what cancel means where it can be said', () => {
  const rows = rowsOf('States')
  assert.deepEqual([...rows.keys()].sort(), Object.keys(MOVES).sort())
  for (const [state, [, next, verbs, cancel = '']] of rows as Map<JobState, string[]>) {
    assert.equal(next, MOVES[state].join(', ') || 'nothing', `what follows ${state}`)
    assert.equal(verbs, verbsIn(state).join(', ') || 'nothing', `what can be said to ${state}`)
    const isRefused = !(VERBS.cancel as readonly JobState[]).includes(state)
    assert.equal(cancel.startsWith('refused'), isRefused, `cancel of ${state}`)
  }
})

test('the page says which kind of job takes which policy on errors, and which is its default', () => {
  const rows = rowsOf('Errors')
  assert.deepEqual([...rows.keys()].sort(), [...ERROR_POLICIES].sort())
  for (const policy of ERROR_POLICIES) {
    const [, , ...cells] = rows.get(policy) ?? []
    const says = ['commit', 'mirror', 'backup'] as const
    const wanted = says.map((kind) => {
      const index = (TERMS[kind].onError as readonly string[]).indexOf(policy)
      return index < 0 ? 'refused' : index === 0 ? 'default' : 'yes'
    })
    assert.deepEqual(cells, wanted, policy)
  }
  assert.deepEqual(TERMS.commit, TERMS.stream)
})
