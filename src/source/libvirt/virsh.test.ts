import assert from 'node:assert/strict'
import { test } from 'node:test'
import { recordedVirsh } from '../../../test/support/recorded-virsh.ts'
import { type ErrorKind, isBlockError } from '../../block/error.ts'
import { runVirsh, Virsh } from './virsh.ts'

const PLACE = { domain: 'web', connect: 'qemu:///system' }

/** That it fails with this kind, in one line that says as much. */
async function fails(asking: Promise<unknown>, kind: ErrorKind, says: RegExp): Promise<void> {
  await assert.rejects(asking, (error) => {
    assert.ok(isBlockError(error), String(error))
    assert.deepEqual([error.kind, error.message.includes('\n')], [kind, false], error.message)
    assert.match(error.message, says)
    return true
  })
}

test('the version is that of the QEMU which libvirt runs', async () => {
  assert.equal(await recordedVirsh().version(), '7.2.22')
})

test('what virsh says when it fails has a kind, and what to do', async () => {
  const none = recordedVirsh(undefined, [], 'none')
  await fails(none.ask('dumpxml'), 'not-found', /failed to get domain 'none'; virsh -c qemu:\/\/\/system list --all/)
  await fails(recordedVirsh('libvirt is down').ask('dumpxml'), 'closed', /No such file or directory; does libvirt run/)
  const sized = ['--checkpointname', 'varve-web-5d0c4e2a-20261123T224403000Z-1a2b3c4d', '--size', '--no-domain']
  await fails(recordedVirsh('shut off').ask('checkpoint-dumpxml', sized), 'closed', /start web$/)
})

const SAID: readonly (readonly [string, ErrorKind])[] = [
  ['error: Timed out during operation: cannot acquire state change lock (held by monitor=remoteDispatchX)', 'busy'],
  ["error: block copy still active: domain has active block job 'x'", 'busy'],
  ['error: Operation not supported: cannot create checkpoint for inactive domain', 'closed'],
  ['error: unsupported configuration: checkpoint for disk vdb unsupported for storage type raw', 'unsupported'],
  ["error: unknown command: 'backup-begin'", 'unsupported'],
  ['error: authentication unavailable: no polkit agent available', 'permission'],
  ['error: checkpoint inconsistent: missing or broken bitmap', 'io'],
  ['', 'io'],
]

for (const [stderr, kind] of SAID)
  test(`${stderr === '' ? 'silence' : stderr.slice(7)} is of kind ${kind}`, async () => {
    const virsh = new Virsh(PLACE, () => Promise.resolve({ status: 1, stdout: '', stderr: `${stderr}\n\n` }))
    await fails(virsh.ask('any'), kind, /^domain web at qemu:\/\/\/system: virsh any fails: ./)
  })

test('without virsh the message says which package has it', async () => {
  const before = process.env['PATH']
  process.env['PATH'] = '/nowhere'
  try {
    await fails(runVirsh(['version'], 1000), 'not-found', /virsh is not installed.*libvirt-clients/)
  } finally {
    process.env['PATH'] = before
  }
})
