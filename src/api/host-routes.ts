// The part of the API's table that is about the host: its machines, and what of all of them is backed up when.

import { z } from 'zod'
import { bytes, job, name, nothing, prove, type Route, terms } from './shapes.ts'

const hooks = z.object({
  by: z.discriminatedUnion('kind', [
    z.object({ kind: z.literal('commands'), freeze: z.string().min(1), thaw: z.string().min(1) }),
    z.object({ kind: z.literal('agent'), socket: z.string().startsWith('/') }),
  ]),
  limitMs: z.number().int().positive().describe('Milliseconds that the guest may be frozen'),
})

const machine = z.object({
  name,
  disks: z.array(name).describe('Snapshot and backed up at one moment'),
  hooks: hooks.optional().describe('How its guest is frozen for that moment'),
})

const windowEnd = z.enum(['finish', 'break'])
const host = z.object({
  machines: z.number().describe('Machines that are backed up at a time'),
  scratchBytes: bytes.describe('Copy space of one disk'),
  scratchHostBytes: bytes.describe('Copy space of all disks together'),
  scratchMemoryBytes: bytes.describe('How much of that is memory at most'),
  bandwidth: bytes.describe('Bytes per second of all backups together; 0 is no limit'),
  windows: z.array(z.string()).describe('When queued backups begin, such as 22:00-06:00, in local time'),
  windowEnd: windowEnd.describe('What becomes of queued backups that run when their window closes'),
  scratch: z
    .object({ used: bytes, peak: bytes, memory: bytes })
    .describe('Copy space in use, the most since the daemon began, and memory taken for it'),
  running: z.array(z.object({ job: name, machine: z.string() })),
  waiting: z.number(),
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
  setGuestHooks: {
    method: 'POST',
    path: '/v1/machines/:machine/hooks',
    summary: 'Says how the guest of a machine is frozen for a moment, by commands or by its agent; null for not at all',
    params: onMachine,
    body: z.object({ hooks: hooks.nullable() }),
    response: machine,
    local: true,
  },
  removeMachine: {
    method: 'DELETE',
    path: '/v1/machines/:machine',
    summary: 'Forgets a machine; its disks stay',
    params: onMachine,
    body: nothing,
    response: nothing,
  },
  showHost: {
    method: 'GET',
    path: '/v1/host',
    summary: 'What backups of this host may take, and take now',
    params: nothing,
    body: nothing,
    response: host,
  },
  setHost: {
    method: 'POST',
    path: '/v1/host',
    summary: 'Changes what backups of this host may take; null is as the daemon was started',
    params: nothing,
    body: z.object({
      machines: z.number().nullish(),
      scratchBytes: bytes.nullish(),
      scratchHostBytes: bytes.nullish(),
      scratchMemoryBytes: bytes.nullish(),
      bandwidth: bytes.nullish(),
      windows: z.array(z.string()).nullish(),
      windowEnd: windowEnd.nullish(),
    }),
    response: host,
  },
  queueBackups: {
    method: 'POST',
    path: '/v1/backups/queue',
    summary: 'Has each machine backed up at its own moment, when its turn comes, as a job each; all when none is named',
    params: nothing,
    body: z.object({
      machines: z.array(name).optional(),
      repository: z.string().min(1),
      full: z.boolean().default(false),
      prove,
      since: name.optional().describe('Copies what changed since this checkpoint of each disk'),
      checkpoint: name.optional().describe('The moment of each becomes this checkpoint'),
      ...terms,
    }),
    response: z.array(job),
  },
} as const satisfies Record<string, Route>

export type HostReply = z.output<typeof host>
export type MachineReply = z.output<typeof machine>
