// A guest whose memory moves from one QEMU to the next again and again while it runs: `node test/guest/run-live-moves.ts [--moves 20] [--disk
// moves|stays|file]`. Its disk moves before it from one daemon to the other, as docs/guests.md has it, or stays at one, or is a file: then there is
// nothing of Varve's in it, and what goes wrong is QEMU's.

import fs from 'node:fs'
import { parseArgs } from 'node:util'
import { homeAt } from '../../src/engine/home.ts'
import { QmpClient } from '../../src/source/qemu/qmp-client.ts'
import { Site } from '../support/site.ts'
import { journalOf, makeGuestDisk } from './journal.ts'
import { guestsMissing } from './kernel.ts'
import { fileDisk, type GuestDisk, GuestMachine, nbdDisk } from './machine.ts'

const { values } = parseArgs({
  options: { moves: { type: 'string', default: '20' }, disk: { type: 'string', default: 'moves' } },
})
const missing = guestsMissing()
if (missing !== false) throw new Error(missing)

/** What a kernel says of memory that is not what it wrote. */
const DAMAGE = /list_(add|del) corruption|kernel BUG|Oops|general protection|unable to handle|bad page/i

const sites = [await Site.start(), await Site.start()] as const
const image = sites[0].path('disk.raw')
makeGuestDisk(image, 'raw')
let guest: GuestMachine | undefined
try {
  if (values.disk !== 'file') await sites[0].done('disk', 'add', 'vm1', image, '-f', 'raw')
  guest = await GuestMachine.boot({ disks: [diskAt(sites[0])], qmp: sites[0].path('qmp-0') })
  await guest.progress(5)
  for (let move = 1; move <= Number(values.moves); move++) guest = await moveGuest(guest, move)
  await guest.finish()
  const at = values.disk === 'moves' ? siteAfter(Number(values.moves)) : sites[0]
  const last = values.disk === 'file' ? image : await imageAt(at)
  await at.daemon.stop()
  console.log(`${values.moves} moves, disk ${values.disk}: ${journalOf(last, 'raw').last} lines, none lost`)
} catch (error) {
  console.log(guest?.console.slice(-6000))
  throw error
} finally {
  await guest?.kill()
  for (const site of sites) await site.end()
}

/** The daemon that has the disk after so many moves. */
function siteAfter(moves: number): Site {
  return sites[(moves % 2) as 0 | 1]
}

function diskAt(site: Site): GuestDisk {
  return values.disk === 'file'
    ? fileDisk('vm1', image, 'raw')
    : nbdDisk('vm1', site.path('home', 'run', 'nbd', 'vm1.sock'))
}

async function imageAt(site: Site): Promise<string> {
  const { layers } = await site.daemon.api.call('showDisk', { disk: 'vm1' }, {})
  return layers.at(-1)?.path ?? ''
}

/** The disk first, then the memory; the QEMU that it came from ends. */
async function moveGuest(from: GuestMachine, move: number): Promise<GuestMachine> {
  const isMoving = values.disk === 'moves'
  const source = isMoving ? siteAfter(move - 1) : sites[0]
  const target = isMoving ? siteAfter(move) : sites[0]
  if (isMoving) await source.done('migrate', 'vm1', `varve+unix://${homeAt(target.home).apiSocket}`)
  const uri = `unix:${sites[0].path(`memory-${move}`)}`
  const [qmp, oldQmp] = [sites[0].path(`qmp-${move}`), sites[0].path(`qmp-${move - 1}`)]
  const to = await GuestMachine.boot({ disks: [diskAt(target)], qmp, incoming: { uri, from } })
  const there = await monitorAt(qmp)
  there.close()
  const here = await monitorAt(oldQmp)
  const said = await moveMemory(here, uri)
  here.close()
  await from.kill()
  if (isMoving) {
    const left = await imageAt(source)
    await source.done('disk', 'remove', 'vm1')
    fs.rmSync(left, { force: true })
  }
  const line = await to.progress(5)
  // What its kernel says of a processor that stood still is of the host, which has too much to do.
  await to.run('check')
  if (DAMAGE.test(to.console)) throw new Error('the guest’s kernel found its memory damaged')
  console.log(`move ${move}: ${said}; line ${line} is synced`)
  return to
}

async function monitorAt(qmp: string): Promise<QmpClient> {
  for (;;) {
    const monitor = await QmpClient.open(qmp).catch(() => undefined)
    if (monitor !== undefined) return monitor
    await new Promise((resolve) => setTimeout(resolve, 50))
  }
}

/** Moves it while it runs; says in how many rounds, and for how long it stood still. */
async function moveMemory(here: QmpClient, uri: string): Promise<string> {
  await here.execute('migrate', { uri })
  for (;;) {
    const { status, downtime, ram } = (await here.execute('query-migrate')) as {
      readonly status?: string
      readonly downtime?: number
      readonly ram?: { readonly 'dirty-sync-count': number }
    }
    if (status === 'completed') return `${ram?.['dirty-sync-count']} rounds, ${downtime} ms at rest`
    if (status === 'failed') throw new Error('the move of memory failed')
    await new Promise((resolve) => setTimeout(resolve, 50))
  }
}
