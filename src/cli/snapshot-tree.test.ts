import assert from 'node:assert/strict'
import { test } from 'node:test'
import { snapshotTree } from './snapshot-tree.ts'

test('snapshots are drawn below those that they follow, and each is drawn once', () => {
  const drawn = (...snapshots: readonly (readonly [name: string, after?: string])[]): string[] =>
    snapshotTree(snapshots.map(([name, after]) => ({ name, after }))).map((one) => one.drawn)
  assert.deepEqual(drawn(), [])
  assert.deepEqual(drawn(['a'], ['b', 'a'], ['c', 'b']), ['a', '└─ b', '   └─ c'])
  assert.deepEqual(drawn(['a'], ['d', 'a'], ['b', 'a'], ['c', 'd'], ['e']), ['a', '├─ d', '│  └─ c', '└─ b', 'e'])
})
