import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { CHUNK_CACHE_BYTES, CHUNK_SLAB_BYTES } from '../base/limits.ts'
import { ChunkCache, type Slab } from './chunk-cache.ts'

const SLABS = CHUNK_CACHE_BYTES / CHUNK_SLAB_BYTES

/** Fills a slab of its own with one chunk of this number. */
function fill(cache: ChunkCache, entry: number): Slab {
  const { slab, into } = cache.take(CHUNK_SLAB_BYTES)
  into.fill(entry)
  cache.add(entry, slab, into.subarray(0, 65_536))
  return slab
}

suite('chunk cache', () => {
  test('what was not asked for the longest goes first', () => {
    const cache = new ChunkCache()
    for (let entry = 0; entry < SLABS; entry++) cache.release(fill(cache, entry))
    assert.equal(cache.find(0)?.[0], 0)
    cache.release(fill(cache, SLABS))
    assert.equal(cache.find(1), undefined)
    assert.equal(cache.find(0)?.[0], 0)
    assert.equal(cache.find(SLABS)?.[0], SLABS)
  })

  test('what is held stays as it is, and memory comes back to its bound when it is released', () => {
    const cache = new ChunkCache()
    const slabs = Array.from({ length: SLABS + 2 }, (_, entry) => fill(cache, entry))
    for (let entry = 0; entry < slabs.length; entry++) assert.equal(cache.find(entry)?.[0], entry)
    for (const slab of slabs) cache.release(slab)
    cache.release(fill(cache, 100))
    const kept = [...slabs.keys(), 100].filter((entry) => cache.find(entry) !== undefined)
    assert.equal(kept.length, SLABS)
    assert.equal(cache.find(100)?.[0], 100)
  })

  test('small reads share a slab, and its memory is used again', () => {
    const cache = new ChunkCache()
    const memories = new Set<Uint8Array>()
    for (let entry = 0; entry < 4000; entry++) {
      const { slab, into } = cache.take(65_536)
      memories.add(slab.memory)
      cache.add(entry, slab, into)
      cache.release(slab)
    }
    assert.equal(memories.size, SLABS)
    assert.ok(cache.find(3999) !== undefined)
  })

  test('a chunk that is in memory can be held against all that comes after it', () => {
    const cache = new ChunkCache()
    cache.release(fill(cache, 7))
    const held = cache.hold(7)
    assert.ok(held !== undefined && cache.hold(8) === undefined)
    for (let entry = 100; entry < 100 + SLABS * 2; entry++) cache.release(fill(cache, entry))
    assert.equal(cache.find(7)?.[65_535], 7)
    cache.release(held)
    for (let entry = 200; entry < 200 + SLABS * 2; entry++) cache.release(fill(cache, entry))
    assert.equal(cache.find(7), undefined)
  })
})
