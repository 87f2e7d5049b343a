import assert from 'node:assert/strict'
import { test } from 'node:test'
import { recordedVirsh } from '../../../test/support/recorded-virsh.ts'
import { isBlockError } from '../../block/error.ts'
import { backupXml, endPull, pullSocket } from './pull-backup.ts'
import { type RunVirsh, Virsh } from './virsh.ts'
import { childrenIn, parseXml } from './xml.ts'

const SOCKET = '/images/web.sock'
const PLACE = { domain: 'web', connect: 'qemu:///system' }

test('a backup job is known by the socket that it serves at; without one there is none', async () => {
  assert.equal(await pullSocket(recordedVirsh()), undefined)
  assert.equal(await pullSocket(recordedVirsh('a backup job is at work')), SOCKET)
})

test('a backup job of somebody else’s is left alone, and the message says how it is ended', async () => {
  const asked: string[] = []
  const isRefusal = (error: unknown): boolean =>
    isBlockError(error, 'busy') && error.message.includes('virsh -c qemu:///system domjobabort web')
  await assert.rejects(endPull(recordedVirsh('a backup job is at work', asked), '/run/ours'), isRefusal)
  assert.deepEqual(asked, ['backup-dumpxml'])
})

test('ours is ended, and waited for', async () => {
  const asked: string[] = []
  const during = recordedVirsh('a backup job is at work')
  let looks = 0
  const run: RunVirsh = async (args) => {
    const command = args[3] ?? ''
    asked.push(command)
    if (command === 'backup-dumpxml' && looks++ === 2)
      return { status: 1, stdout: '', stderr: 'error: Domain backup job id not found: no domain backup job present\n' }
    return { status: 0, stdout: await during.ask(command), stderr: '' }
  }
  assert.equal(await endPull(new Virsh(PLACE, run), SOCKET), true)
  assert.deepEqual(asked, ['backup-dumpxml', 'domjobabort', 'backup-dumpxml', 'backup-dumpxml'])
  assert.equal(await endPull(recordedVirsh(), SOCKET), false)
})

test('a job says of each disk whether and since when, and where its old data goes', () => {
  const text = backupXml({
    socket: SOCKET,
    all: ['vda', 'vdb', 'hda'],
    disks: [
      { name: 'vda', scratch: '/s/a', since: 'monday' },
      { name: 'vdb', scratch: '/s/b' },
    ],
  })
  const disks = childrenIn(parseXml(text), 'disks', 'disk')
  assert.deepEqual(
    disks.map(({ attributes }) => Object.fromEntries(attributes)),
    [
      {
        name: 'vda',
        backup: 'yes',
        type: 'file',
        exportname: 'vda',
        backupmode: 'incremental',
        incremental: 'monday',
        exportbitmap: 'changed',
      },
      { name: 'vdb', backup: 'yes', type: 'file', exportname: 'vdb', backupmode: 'full' },
      { name: 'hda', backup: 'no' },
    ],
  )
})
