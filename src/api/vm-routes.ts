// The part of the API's table that is about machines in QEMUs of their own, which Varve reaches by their monitors or by libvirt.

import { z } from 'zod'
import { bytes, job, name, nothing, type Route } from './shapes.ts'

const vmDisk = z.object({
  name: z.string(),
  size: bytes,
  format: z.string(),
  file: z.string(),
  bitmap: z
    .enum(['persistent', 'transient', 'compared', 'skipped'])
    .describe('What changes is recorded in the image, as long as QEMU lives, or not; or the disk is not backed up'),
  reason: z.string().optional(),
  bitmaps: z.array(z.string()).describe("Varve's own that it has"),
})

const libvirt = z.object({
  domain: z.string().min(1).describe('Its name at libvirt'),
  connect: z.string().min(1).describe("The URI of its libvirt, which is asked by this host's virsh"),
})

const vm = z.object({
  name,
  qmp: z.string().optional().describe('Its monitor, unless it is of libvirt'),
  libvirt: libvirt.optional(),
  agent: z.string().optional(),
  state: z.enum(['running', 'away']),
  error: z.string().optional().describe('Why QEMU cannot be asked'),
  version: z.string().optional(),
  disks: z.array(vmDisk),
  removed: z.array(z.string()).describe('What an earlier backup had left in it, and is gone now'),
})

const onVm = z.object({ vm: name })
const freezeMs = z.number().int().positive().optional().describe('How long the guest may be frozen, in milliseconds')
const socket = z.string().startsWith('/').describe('Absolute path of a Unix socket')

export const vmRoutes = {
  listVms: {
    method: 'GET',
    path: '/v1/vms',
    summary: 'The machines in QEMUs of their own, each asked what it has now',
    params: nothing,
    body: nothing,
    response: z.array(vm),
  },
  addVm: {
    method: 'POST',
    path: '/v1/vms',
    summary: 'Takes in a machine that runs in a QEMU of its own, by its monitor or by libvirt',
    params: nothing,
    body: z.union([
      z.object({ name, qmp: socket, agent: socket.optional(), freezeMs }),
      z.object({ name, libvirt, freezes: z.boolean().optional().describe("By the guest's agent"), freezeMs }),
    ]),
    response: vm,
    local: true,
  },
  showVm: {
    method: 'GET',
    path: '/v1/vms/:vm',
    summary: 'One of them, and what can be done with each of its disks',
    params: onVm,
    body: nothing,
    response: vm,
  },
  vmJob: {
    method: 'POST',
    path: '/v1/vms/:vm/jobs',
    summary: 'Has its QEMU merge or copy a disk, as a job; one of that kind that is at it already is the answer',
    params: onVm,
    body: z.object({
      kind: z.enum(['vm-commit', 'vm-stream', 'vm-mirror']),
      disk: name,
      speed: bytes.default(0).describe('Bytes per second; 0 is no limit'),
      target: z
        .object({ file: z.string().startsWith('/'), format: z.enum(['raw', 'qcow2']) })
        .optional()
        .describe('Of a mirror: the image that is made'),
    }),
    response: job,
    local: true,
  },
  removeVm: {
    method: 'DELETE',
    path: '/v1/vms/:vm',
    summary: 'Forgets one, with all that Varve has in its QEMU',
    params: onVm,
    body: nothing,
    response: z.object({ left: z.string().optional().describe('What could not be removed, and why') }),
  },
} as const satisfies Record<string, Route>

export type VmReply = z.output<typeof vm>
