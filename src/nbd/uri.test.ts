import assert from 'node:assert/strict'
import { test } from 'node:test'
import { isBlockError } from '../block/error.ts'
import { checkSocketPath, formatNbdUri, type NbdUri, parseNbdUri } from './uri.ts'

test('the examples of the URI specification give the export names that it says', () => {
  const names = ['disk', '', '', '/disk', 'hello world']
  const uris = ['/disk', '/', '', '//disk', '/hello%20world'].map((path) => `nbd://example.com${path}`)
  assert.deepEqual(
    uris.map((uri) => parseNbdUri(uri).name),
    names,
  )
  const unix = parseNbdUri('nbd+unix:///disk?socket=sock')
  assert.deepEqual(unix, { transport: 'unix', path: 'sock', name: 'disk' })
})

test('a TCP URI without a port means port 10809, and an IPv6 address loses its brackets', () => {
  assert.deepEqual(parseNbdUri('nbd://localhost/a'), { transport: 'tcp', host: 'localhost', port: 10_809, name: 'a' })
  assert.deepEqual(parseNbdUri('nbd://[::1]:7/'), { transport: 'tcp', host: '::1', port: 7, name: '' })
})

test('formatting and parsing give the same target back', () => {
  const targets: NbdUri[] = [
    { transport: 'unix', path: '/run/varve/a b?c&d=e#f%.sock', name: '' },
    { transport: 'unix', path: '/x', name: 'vm1/disk ä?&#%+' },
    { transport: 'tcp', host: '127.0.0.1', port: 10_809, name: '/leading' },
    { transport: 'tcp', host: '::1', port: 1, name: 'x' },
    { transport: 'tcp', host: 'a.example', port: 10_809, name: 'x', tls: {} },
    { transport: 'tcp', host: '::1', port: 5, name: '', tls: { files: { kind: 'x509', folder: '/etc/pki/a b' } } },
    {
      transport: 'unix',
      path: '/x',
      name: 'd',
      tls: { files: { kind: 'x509', folder: '/c' }, hostname: 'vm.example' },
    },
    { transport: 'unix', path: '/x', name: 'd', tls: { files: { kind: 'psk', file: '/k' }, username: 'al@ice' } },
    { transport: 'tcp', host: 'h', port: 1, name: '', tls: { files: { kind: 'psk', file: '/k' }, username: 'bob' } },
  ]
  for (const target of targets) assert.deepEqual(parseNbdUri(formatNbdUri(target)), target)
})

test('what is no NBD URI is refused with a reason', () => {
  const bad = [
    ['', 'not a URI'],
    ['disk.qcow2', 'not a URI'],
    ['http://localhost/', 'scheme'],
    ['nbd:///name', 'host'],
    ['nbd://localhost:0/', 'port'],
    ['nbd://localhost:99999/', 'not a URI'],
    ['nbd://localhost/?socket=/x', 'socket'],
    ['nbd+unix:///a', 'socket'],
    ['nbd+unix:///a?socket=', 'socket'],
    ['nbd+unix:///a?socket=/x&socket=/y', 'twice'],
    ['nbd+unix:///a?socket=/x&tls-type=psk', 'tls-type'],
    ['nbd+unix://host/a?socket=/x', 'host'],
    ['nbd://alice@localhost/', 'only with TLS'],
    ['nbd://localhost/?tls-certificates=/x', 'tls-certificates'],
    ['nbds://localhost/?tls-certificates=/x&tls-psk-file=/y', 'both'],
    ['nbds://localhost/?tls-type=anon', 'anon'],
    ['nbds://localhost/?tls-type=psk', 'psk'],
    ['nbd+unix:///%ff?socket=/x', 'UTF-8'],
    [`nbd://localhost/${'n'.repeat(4097)}`, '4096'],
  ] as const
  for (const [uri, why] of bad) {
    assert.throws(
      () => parseNbdUri(uri),
      (error) => isBlockError(error, 'invalid-argument') && error.message.includes(why),
      uri,
    )
  }
})

test('an abstract socket is refused as unsupported', () => {
  assert.throws(
    () => parseNbdUri('nbd+unix:///?socket=%00/abstract'),
    (error) => isBlockError(error, 'unsupported'),
  )
})

test('a socket path of 107 bytes is the longest', () => {
  checkSocketPath('/'.padEnd(107, 'x'))
  for (const path of ['', '/'.padEnd(108, 'x'), '/'.padEnd(56, 'ä')]) {
    assert.throws(
      () => checkSocketPath(path),
      (error) => isBlockError(error, 'invalid-argument'),
    )
  }
})
