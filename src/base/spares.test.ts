import assert from 'node:assert/strict'
import { mock, test } from 'node:test'
import { Spares } from './spares.ts'

test('what is kept is taken again, and no more is kept than was asked for', () => {
  const spares = new Spares<string>(2, 1000)
  assert.equal(spares.take(), undefined)
  assert.deepEqual([spares.keep('a'), spares.keep('b'), spares.keep('c')], [true, true, false])
  assert.deepEqual([spares.take(), spares.take(), spares.take()], ['b', 'a', undefined])
})

test('what nobody takes is dropped when nothing was kept for a while', (t) => {
  mock.timers.enable({ apis: ['setTimeout'] })
  t.after(() => mock.timers.reset())
  const dropped: string[] = []
  const spares = new Spares<string>(3, 1000, (spare) => dropped.push(spare))
  spares.keep('a')
  mock.timers.tick(1000)
  assert.deepEqual(dropped, ['a'])
  assert.equal(spares.take(), undefined)
  spares.keep('b')
  assert.equal(spares.take(), 'b')
  mock.timers.tick(1000)
  assert.deepEqual(dropped, ['a'])
})
