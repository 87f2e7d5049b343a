// Answers the routes about the host: its machines, those in QEMUs of their own, its limits, and backups that are queued.

import type { EngineService } from '../engine/service.ts'
import type { hostRoutes } from './host-routes.ts'
import type { Body, Params, Reply, RouteName } from './schema.ts'
import type { vmRoutes } from './vm-routes.ts'

/** What answers each route. */
export type Handlers<N extends RouteName = RouteName> = {
  [K in N]: (params: Params<K>, body: Body<K>) => Promise<Reply<K>> | Reply<K>
}

export function hostHandlersOf(engine: EngineService): Handlers<keyof typeof hostRoutes | keyof typeof vmRoutes> {
  const { machines, vms, host } = engine
  return {
    listVms: () => vms.list() as Promise<Reply<'listVms'>>,
    addVm: (_params, request) => vms.add(request) as Promise<Reply<'addVm'>>,
    showVm: ({ vm }) => vms.show(vm) as Promise<Reply<'showVm'>>,
    vmJob: ({ vm }, request) => engine.vmJob({ machine: vm, ...request }) as Promise<Reply<'vmJob'>>,
    removeVm: ({ vm }) => vms.remove(vm),
    listMachines: () => machines.list() as Reply<'listMachines'>,
    createMachine: (_params, { name, disks }) => machines.create(name, disks) as Promise<Reply<'createMachine'>>,
    showMachine: ({ machine }) => machines.show(machine) as Reply<'showMachine'>,
    changeMachine: ({ machine }, change) => machines.change(machine, change) as Promise<Reply<'changeMachine'>>,
    setGuestHooks: ({ machine }, { hooks }) =>
      machines.setHooks(machine, hooks ?? undefined) as Promise<Reply<'setGuestHooks'>>,
    removeMachine: async ({ machine }) => {
      await machines.remove(machine)
      return {}
    },
    showHost: () => host.show() as Reply<'showHost'>,
    setHost: (_params, change) => host.set(change) as Promise<Reply<'setHost'>>,
    queueBackups: (_params, request) => engine.queueBackups(request) as Promise<Reply<'queueBackups'>>,
  }
}
