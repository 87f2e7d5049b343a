// Part "hundred-disks": what a daemon with a hundred disks keeps in memory, with an idle client of each, and after a thousand
// connections came and went.

import path from 'node:path'
import { connectNbd, type NbdClient } from '../../src/nbd/client.ts'
import { addDisk, startDaemon } from '../daemon.ts'
import { memoryOf } from '../machine.ts'
import type { Part } from '../part.ts'
import { VARVE } from '../servers.ts'

const DISKS = 100
const DISK_GIB = 32
const CONNECTIONS = 1000
const AT_ONCE = 50

/** The moments at which memory is read, in order. */
const EMPTY = 'no disk'
const ADDED = '100 disks'
const CONNECTED = 'and 100 idle clients'
const AFTER = 'after 1,000 connections'

export const HUNDRED_DISKS: Part = {
  name: 'hundred-disks',
  title: 'A hundred disks in one daemon',
  extent: { rounds: 1 },
  about:
    () => `Resident memory of \`varve serve\` with ${DISKS} qcow2 disks of ${DISK_GIB} GiB, with one idle client of each, and after another
${CONNECTIONS.toLocaleString('en-US')} connections were opened and dropped, ${AT_ONCE} at a time.`,
  async measure(bench) {
    const name = 'resident memory'
    if (!bench.has(VARVE.name, VARVE.version()) || !bench.wants(name)) return []
    const daemon = await startDaemon(bench.folder)
    try {
      const moments = new Map<string, number>()
      const look = (moment: string): void => {
        const { now } = memoryOf(daemon.pid)
        moments.set(moment, now)
        console.error(`  ${moment}: ${now.toFixed(0)} MiB`)
      }
      look(EMPTY)
      const uris: string[] = []
      for (let index = 0; index < DISKS; index++)
        uris.push(await addDisk(daemon, path.join(bench.folder, `${index}.qcow2`), 'qcow2', DISK_GIB * 1024))
      look(ADDED)
      const guests = await connectAll(uris)
      look(CONNECTED)
      for (let done = 0; done < CONNECTIONS; done += AT_ONCE) {
        const few = Array.from({ length: AT_ONCE }, (_, index) => uris[(done + index) % DISKS] as string)
        await closeAll(await connectAll(few))
      }
      look(AFTER)
      await closeAll(guests)
      return [
        {
          table: 'memory',
          name,
          unit: 'MiB',
          subject: CONNECTED,
          figures: [...moments].map(([program, mib]) => ({ program, rounds: [mib] })),
          asks: [{ atMost: 600 }, { program: AFTER, of: CONNECTED, atMost: 1.05 }],
        },
      ]
    } finally {
      await daemon.stop()
    }
  },
}

function connectAll(uris: readonly string[]): Promise<NbdClient[]> {
  return Promise.all(uris.map((uri) => connectNbd(uri)))
}

async function closeAll(clients: readonly NbdClient[]): Promise<void> {
  await Promise.all(clients.map((client) => client.close()))
}
