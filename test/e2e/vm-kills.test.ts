// A few kills of Varve and of QEMU in backups of a machine in a QEMU of its own. run-vm-kills.ts does as many as it is told.

import { test } from 'node:test'
import { seedOfRun } from '../../src/base/random.ts'
import { missing } from '../support/peer.ts'
import { Site } from '../support/site.ts'
import { KilledVm } from './killed-vms.ts'

const skip = missing('qemu-system-x86_64', 'qemu-img')

test('after a kill of Varve or QEMU the next backup works and nothing is left in QEMU', { skip }, async (t) => {
  const seed = seedOfRun()
  t.diagnostic(`VARVE_SEED=${seed}`)
  const site = await Site.start()
  t.after(() => site.end())
  const killed = new KilledVm(site, seed, t)
  await killed.start()
  for (const victim of ['varve', 'varve', 'varve', 'qemu', 'qemu'] as const) await killed.kill(victim)
  const { during, backups, incremental } = killed.figures
  t.diagnostic(`killed ${[...during.keys()].join(', ')}; ${backups} backups, ${incremental} incremental`)
})
