import assert from 'node:assert/strict'
import { test } from 'node:test'
import { BlockError } from '../../block/error.ts'
import { childOf, childrenIn, parseXml, xml } from './xml.ts'

test('elements, attributes, text and characters by their names and numbers are read', () => {
  const root = parseXml(
    `<?xml version="1.0"?><!-- a <b> --><a one='1' two = "&lt;&#65;&#x42;'"> x <b/> y<c><d>in &amp; out</d><d/></c></a>\n`,
  )
  assert.equal(root.name, 'a')
  assert.deepEqual(
    [...root.attributes],
    [
      ['one', '1'],
      ['two', "<AB'"],
    ],
  )
  assert.equal(root.text, 'x  y')
  assert.deepEqual(
    childrenIn(root, 'c', 'd').map(({ text }) => text),
    ['in & out', ''],
  )
  assert.equal(childOf(root, 'none'), undefined)
  assert.deepEqual(childrenIn(root, 'none', 'd'), [])
})

test('what was written is read as it was', () => {
  const odd = `a'b"c<d>&e; é`
  const root = parseXml(xml('x', { odd, left: undefined }, xml('y', { odd })))
  assert.equal(root.attributes.get('odd'), odd)
  assert.equal(root.attributes.has('left'), false)
  assert.equal(childOf(root, 'y')?.attributes.get('odd'), odd)
})

const BAD = {
  nothing: '',
  words: 'error',
  'two elements': '<a/><b/>',
  'words after it': '<a/>b',
  'an open element': '<a><b></b>',
  'crossed elements': '<a><b></a></b>',
  'a close too many': '<a/></a>',
  'half a tag': '<a><b',
  'a type': '<!DOCTYPE a><a/>',
  'an unknown character': '<a>&euro;</a>',
  'a lone ampersand': '<a>b & c</a>',
  'a number past all': '<a>&#x110000;</a>',
  'no quotes': '<a b=c/>',
  'a comment without an end': '<a><!-- b</a>',
  depth: `${'<a>'.repeat(1000)}${'</a>'.repeat(1000)}`,
} as const

for (const [what, text] of Object.entries(BAD))
  test(`${what} in place of XML is refused in one line`, () => {
    const isRefusal = (error: unknown): boolean =>
      error instanceof BlockError && error.kind === 'protocol' && !error.message.includes('\n')
    assert.throws(() => parseXml(text), isRefusal)
  })
