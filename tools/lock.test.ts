import assert from 'node:assert/strict'
import { test } from 'node:test'
import { leftOut, readLock } from './lock.ts'

test('the lock is complete, so that npm ci installs it (else run: node tools/lock.ts)', () => {
  assert.deepEqual(Object.keys(leftOut(readLock().packages)), [])
})

test('a build for another platform that npm left out is added for that platform only', () => {
  const optionalDependencies = {
    '@a/b-linux-x64-musl': '1.0.0',
    '@a/b-darwin-arm64': '1.0.0',
    '@a/b-linux-x64': '1.0.0',
  }
  const packages = {
    'node_modules/@a/b': { version: '1.0.0', dev: true, optionalDependencies },
    'node_modules/@a/b-linux-x64': { version: '1.0.0' },
  }
  assert.deepEqual(leftOut(packages), {
    'node_modules/@a/b-linux-x64-musl': {
      version: '1.0.0',
      dev: true,
      optional: true,
      os: ['linux'],
      cpu: ['x64'],
      libc: ['musl'],
    },
    'node_modules/@a/b-darwin-arm64': { version: '1.0.0', dev: true, optional: true, os: ['darwin'], cpu: ['arm64'] },
  })
})
