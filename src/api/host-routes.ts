// The part of the API's table that is about the host: its machines, and what of all of them is backed up when.

import { z } from 'zod'
import { name, nothing, type Route } from './shapes.ts'

const machine = z.object({
  name,
  disks: z.array(name).describe('Snapshot and backed up at one moment'),
})

const onMachine = z.object({ machine: name })

export const hostRoutes = {
  listMachines: {
    method: 'GET',
    path: '/v1/machines',
    summary: 'All machines that have a name of their own; any other disk is a machine by itself',
    params: nothing,
    body: nothing,
    response: z.array(machine),
  },
  createMachine: {
    method: 'POST',
    path: '/v1/machines',
    summary: 'Makes a machine of disks that are of none',
    params: nothing,
    body: z.object({ name, disks: z.array(name).min(1) }),
    response: machine,
  },
  showMachine: {
    method: 'GET',
    path: '/v1/machines/:machine',
    summary: 'One machine',
    params: onMachine,
    body: nothing,
    response: machine,
  },
  changeMachine: {
    method: 'POST',
    path: '/v1/machines/:machine',
    summary: 'Adds disks to a machine and takes others out',
    params: onMachine,
    body: z.object({ add: z.array(name).optional(), remove: z.array(name).optional() }),
    response: machine,
  },
  removeMachine: {
    method: 'DELETE',
    path: '/v1/machines/:machine',
    summary: 'Forgets a machine; its disks stay',
    params: onMachine,
    body: nothing,
    response: nothing,
  },
} as const satisfies Record<string, Route>

export type MachineReply = z.output<typeof machine>
