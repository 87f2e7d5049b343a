// Kills of Varve, and of QEMU, at random moments of backups of a machine in a QEMU of its own: see killed-vms.ts.
//
//   node test/e2e/run-vm-kills.ts --varve 50 --qemu 20 --seed 1

import { parseArgs } from 'node:util'
import { Site } from '../support/site.ts'
import { KilledVm, type Victim } from './killed-vms.ts'

const { values } = parseArgs({
  options: {
    varve: { type: 'string', default: '50' },
    qemu: { type: 'string', default: '20' },
    seed: { type: 'string', default: '1' },
  },
})

const site = await Site.start({ args: ['--shards', '2'] })
const works: (() => void)[] = []
try {
  const killed = new KilledVm(site, Number(values.seed), { after: (work) => void works.push(work) })
  await killed.start()
  const victims: Victim[] = ['varve', 'qemu']
  for (const victim of victims) for (let left = Number(values[victim]); left > 0; left--) await killed.kill(victim)
  const { kills, during, backups, incremental, usualMs } = killed.figures
  console.log(`${kills} kills (${values.varve} of Varve, ${values.qemu} of QEMU), a backup takes ${usualMs} ms`)
  console.log(`killed ${[...during].map(([name, times]) => `${name} ${times}`).join(', ')}`)
  console.log(`${backups} backups afterwards, ${incremental} of them incremental: all as it must be`)
} finally {
  for (const work of works) work()
  await site.end()
}
