import assert from 'node:assert/strict'
import { test } from 'node:test'
import { parseCreateOptions } from './create-options.ts'

test('options are read by the names and values that qemu-img has', () => {
  assert.deepEqual(parseCreateOptions('qcow2', ['cluster_size=2M,compat=v3', 'lazy_refcounts', 'extended_l2=off']), {
    clusterSize: 2 * 1024 * 1024,
    version: 3,
    lazyRefcounts: true,
    extendedL2: false,
  })
  assert.deepEqual(parseCreateOptions('qcow2', ['compat=0.10,refcount_bits=16,compression_type=zstd,size=1G']), {
    version: 2,
    refcountBits: 16,
    compression: 'zstd',
    size: 1024 ** 3,
  })
  assert.deepEqual(parseCreateOptions('raw', ['preallocation=full,size=4k']), { preallocation: 'full', size: 4096 })
  assert.deepEqual(parseCreateOptions('qcow2', []), {})
})

test('two commas are one in a value, and a value may hold an equals sign', () => {
  const text = 'backing_file=a,,b=c.raw,backing_fmt=raw,data_file=d.raw,data_file_raw=on'
  assert.deepEqual(parseCreateOptions('qcow2', [text]), {
    backingName: 'a,b=c.raw',
    backingFormat: 'raw',
    dataFile: 'd.raw',
    dataFileRaw: true,
  })
})

test('the last of several values of one option counts', () => {
  assert.deepEqual(parseCreateOptions('qcow2', ['cluster_size=4k,cluster_size=8k', 'cluster_size=16k']), {
    clusterSize: 16_384,
  })
})

test('names and values that are none are refused, each with what is possible', () => {
  for (const [format, text, says] of [
    ['qcow2', 'colour=blue', /no option "colour", only size, compat/],
    ['qcow2', 'constructor=1', /no option "constructor"/],
    ['raw', 'cluster_size=4k', /a raw image has no option "cluster_size", only size, preallocation/],
    ['qcow2', 'cluster_size=large', /cluster_size is a size/],
    ['qcow2', 'compat=2', /compat is 0\.10 \(v2\) or 1\.1 \(v3\)/],
    ['qcow2', 'lazy_refcounts=maybe', /lazy_refcounts is on or off/],
    ['qcow2', 'lazy_refcounts=', /lazy_refcounts is on or off/],
    ['qcow2', 'refcount_bits=-1', /refcount_bits is 1, 2/],
    ['qcow2', 'compression_type=lz4', /zlib or zstd/],
    ['raw', 'preallocation=metadata', /off, falloc or full/],
    ['qcow2', 'backing_file=', /a file name/],
  ] as const) {
    assert.throws(() => parseCreateOptions(format, [text]), { kind: 'invalid-argument', message: says })
  }
  assert.throws(() => parseCreateOptions('qcow2', ['encrypt.format=luks']), { kind: 'unsupported' })
})
