// The guests of the tests themselves: boots, journals, commands, the agent's stand-in; and that a damaged or torn journal is found.

import assert from 'node:assert/strict'
import fs from 'node:fs'
import path from 'node:path'
import { test } from 'node:test'
import { type AgentCommand, agentCall } from '../../src/guest/guest-agent.ts'
import { peer } from '../support/peer.ts'
import { tempFolder } from '../support/temp.ts'
import { assertOneMoment, journalOf, makeGuestDisk } from './journal.ts'
import { guestsMissing } from './kernel.ts'
import { fileDisk, GuestMachine } from './machine.ts'

const skip = guestsMissing()
/** Of the file system, and of a line. */
const BLOCK = 1024
const BLOB = 32 * 1024
const PATIENCE_MS = 100_000

/** What the agent of a guest returns; QEMU listens at the socket before the guest's agent reads it. */
const ask = (socket: string, command: AgentCommand): Promise<unknown> =>
  agentCall(socket, command, AbortSignal.timeout(PATIENCE_MS))

test('a guest keeps one journal on its disks, of files and of both formats, and holds still for its agent', {
  skip,
}, async (t) => {
  const folder = tempFolder(t)
  const disks = [
    { name: 'a', image: path.join(folder, 'a.qcow2'), format: 'qcow2' },
    { name: 'b', image: path.join(folder, 'b.raw'), format: 'raw' },
  ] as const
  for (const { image, format } of disks) makeGuestDisk(image, format)
  const agent = path.join(folder, 'agent')
  const options = { disks: disks.map(({ name, image, format }) => fileDisk(name, image, format)), agent }
  const guest = await GuestMachine.boot(options)
  t.after(() => guest.kill())
  await guest.progress(5)
  await guest.check()
  assert.equal(await guest.run('echo $names'), 'a b\n')
  await assert.rejects(guest.run('ls /nowhere'), /failed with 1/)

  assert.equal(await ask(agent, 'guest-fsfreeze-status'), 'thawed')
  assert.equal(await ask(agent, 'guest-fsfreeze-freeze'), 2)
  assert.equal(await ask(agent, 'guest-fsfreeze-status'), 'frozen')
  assert.equal(await ask(agent, 'guest-fsfreeze-thaw'), 2)
  await guest.progress(2)
  const { synced } = guest
  await guest.kill()
  const journals = disks.map(({ image, format }) => journalOf(image, format))
  assertOneMoment(journals)
  assert.ok(journals.every(({ first, last }) => first === 1 && last >= synced))

  // It goes on where its disks are, also when one of them is behind.
  makeGuestDisk(path.join(folder, 'c.raw'), 'raw')
  const again = await GuestMachine.boot({
    ...options,
    disks: [...options.disks, fileDisk('c', path.join(folder, 'c.raw'), 'raw')],
    isWriting: false,
  })
  t.after(() => again.kill())
  assert.equal(again.synced, 0)
  await again.run('writing=yes')
  await again.progress(1)
  await again.finish()
  const [first, second] = disks.map(({ image, format }) => journalOf(image, format))
  assert.deepEqual(first, second)
  assert.deepEqual(journalOf(path.join(folder, 'c.raw'), 'raw').last, first?.last)
})

test('a journal with a line or a blob that is wrong, and disks of two moments, are found', { skip }, async (t) => {
  const folder = tempFolder(t)
  const image = path.join(folder, 'a.raw')
  makeGuestDisk(image, 'raw')
  const guest = await GuestMachine.boot({ disks: [fileDisk('a', image, 'raw')] })
  t.after(() => guest.kill())
  await guest.progress(3)
  await guest.finish()
  assert.ok(journalOf(image, 'raw').last >= 3)

  const whole = fs.readFileSync(image)
  const blockOf = (file: string, block: number): number =>
    Number(peer('debugfs', '-R', `bmap /${file} ${block}`, image).trim().split('\n')[0]) * BLOCK
  const damaged = (at: number): string => {
    const copy = Buffer.from(whole)
    copy[at] = (copy[at] as number) ^ 1
    fs.writeFileSync(`${image}.damaged`, copy)
    return `${image}.damaged`
  }
  assert.throws(() => journalOf(damaged(blockOf('journal', 0) + 5), 'raw'), /line 1/)
  assert.throws(() => journalOf(damaged(blockOf('noise', BLOB / BLOCK) + 99), 'raw'), /blob of line 1/)

  const moment = (...lasts: number[]): void => assertOneMoment(lasts.map((last) => ({ first: 1, last })))
  moment(7, 7, 6)
  assert.throws(() => moment(6, 7), /not one moment/)
  assert.throws(() => moment(7, 5), /not one moment/)
})
