// The machines of a home: named groups of disks that are snapshot and backed up at one moment, with one outcome. A disk that is of no
// machine is one by itself, under its own name; so a machine and a disk never share a name, and a disk is of one machine at most.
// What is done to a machine's disks is elsewhere: here is only which they are.

import { GUEST_FREEZE_MAX_MS } from '../base/limits.ts'
import type { Mutex } from '../base/mutex.ts'
import { BlockError } from '../block/error.ts'
import type { GuestHooks } from '../guest/guest-hooks.ts'
import type { Catalog, CatalogChange, MachineRecord } from './catalog.ts'
import { checkName } from './context.ts'

/** A machine as the API shows it, also a disk that is one by itself. */
export interface Machine {
  readonly name: string
  readonly disks: readonly string[]
  readonly hooks?: GuestHooks
}

export interface MachineChange {
  readonly add?: readonly string[] | undefined
  readonly remove?: readonly string[] | undefined
}

export class Machines {
  readonly #catalog: Pick<Catalog, 'get' | 'list'>
  readonly #commit: (changes: readonly CatalogChange[]) => Promise<void>
  readonly #control: Mutex

  /** `control` is held by whatever adds or removes disks. */
  constructor(
    catalog: Pick<Catalog, 'get' | 'list'>,
    commit: (changes: readonly CatalogChange[]) => Promise<void>,
    control: Mutex,
  ) {
    this.#catalog = catalog
    this.#commit = commit
    this.#control = control
  }

  /** Those of Varve's disks that have a name of their own, in the order in which they were made. */
  list(): Machine[] {
    return this.#catalog.list('machine').flatMap((record) => (record.qemu === undefined ? [shown(record)] : []))
  }

  /** Kind 'not-found' when there is none of that name; a disk by itself has none. */
  show(name: string): Machine {
    return shown(this.#find(name))
  }

  /** Kinds 'exists' for a name in use, 'not-found' for a disk that is not there, 'busy' for one of another machine. */
  create(name: string, disks: readonly string[]): Promise<Machine> {
    return this.#control.run(async () => {
      checkName('machine', name)
      if (this.#catalog.get('machine', name) !== undefined)
        throw new BlockError('exists', `there is a machine ${name} already: varve machine show ${name}`)
      if (this.#hasDisk(name))
        throw new BlockError('exists', `there is a disk ${name}: give the machine a name that no disk has`)
      return this.#put({ id: name, disks: this.#checked(name, disks) })
    })
  }

  /** Changes which disks it has; the last one stays. Kinds as for `create`. */
  change(name: string, { add = [], remove = [] }: MachineChange): Promise<Machine> {
    return this.#control.run(async () => {
      const record = this.#find(name)
      const stranger = remove.find((disk) => !record.disks.includes(disk))
      if (stranger !== undefined)
        throw new BlockError('not-found', `machine ${name} has no disk ${stranger}: it has ${record.disks.join(', ')}`)
      const kept = record.disks.filter((disk) => !remove.includes(disk))
      return this.#put({ ...record, disks: this.#checked(name, [...kept, ...add]) })
    })
  }

  /** Says how its guest is frozen for a moment; undefined for not at all. Kind 'invalid-argument' for a limit that cannot be. */
  setHooks(name: string, hooks: GuestHooks | undefined): Promise<Machine> {
    return this.#control.run(async () => {
      // Also of one in a QEMU of its own.
      const { hooks: _before, ...record } = this.#catalog.get('machine', name) ?? this.#find(name)
      if (hooks === undefined) return this.#put(record)
      const { limitMs } = hooks
      if (!(limitMs >= 1 && limitMs <= GUEST_FREEZE_MAX_MS))
        throw new BlockError('invalid-argument', `a guest frozen for ${limitMs} ms: 1 to ${GUEST_FREEZE_MAX_MS}`)
      return this.#put({ ...record, hooks })
    })
  }

  /** Forgets it; its disks stay, each a machine by itself. */
  remove(name: string): Promise<void> {
    return this.#control.run(async () => {
      this.#find(name)
      await this.#commit([
        { remove: 'machine', id: name },
        { remove: 'forecast', id: name },
      ])
    })
  }

  /** The machine of a name that a user says: one that has it, or the disk that is one by itself. Kind 'not-found' when there is neither. */
  named(name: string): Machine {
    const record = this.#catalog.get('machine', name)
    if (record !== undefined) return shown(record)
    if (this.#hasDisk(name)) return { name, disks: [name] }
    const remedy = 'varve machine list and varve disk list show those there are'
    throw new BlockError('not-found', `there is no machine or disk ${name}: ${remedy}`)
  }

  /** Every machine of the home, those in QEMUs of their own, and the disks that are one by themselves; not those whose guests are elsewhere. */
  all(): Machine[] {
    const machines = this.#catalog.list('machine').map(shown)
    const grouped = new Set(machines.flatMap(({ disks }) => disks))
    const alone = this.#catalog
      .list('disk')
      .filter(({ name, incoming, away }) => incoming === undefined && away === undefined && !grouped.has(name))
    return [...machines, ...alone.map(({ name }) => ({ name, disks: [name] }))]
  }

  /** What names mean together, for work at one moment: all their disks, and the machine where they are just one. */
  together(names: readonly string[]): { readonly disks: readonly string[]; readonly machine?: string } {
    const machines = names.map((name) => this.named(name))
    const inQemu = machines.find(({ name }) => this.isInQemu(name))
    if (inQemu !== undefined && machines.length > 1)
      throw new BlockError(
        'invalid-argument',
        `machine ${inQemu.name} runs in a QEMU of its own: its moment is no other's`,
      )
    const disks = machines.flatMap((machine) => machine.disks)
    const [only, ...others] = machines
    const isNamed = only !== undefined && others.length === 0 && !only.disks.includes(only.name)
    return isNamed ? { disks, machine: only.name } : { disks }
  }

  /** Whether a machine runs in a QEMU of its own, which has its disks. */
  isInQemu(name: string): boolean {
    return this.#catalog.get('machine', name)?.qemu !== undefined
  }

  /** The disks of Varve's that names mean. Kind 'unsupported' for a machine in a QEMU of its own, of which `what` cannot be done here. */
  disksOf(names: readonly string[], what: string): readonly string[] {
    const inQemu = names.find((name) => this.isInQemu(name))
    if (inQemu === undefined) return this.together(names).disks
    throw new BlockError('unsupported', `${what} is for disks of Varve's: machine ${inQemu} runs in a QEMU of its own`)
  }

  #find(name: string): MachineRecord {
    const record = this.#catalog.get('machine', name)
    if (record !== undefined && record.qemu === undefined) return record
    const remedy = this.#hasDisk(name)
      ? `disk ${name} is a machine by itself`
      : record !== undefined
        ? `${name} runs in a QEMU of its own: varve vm show ${name}`
        : 'varve machine list shows those there are'
    throw new BlockError('not-found', `there is no machine ${name}: ${remedy}`)
  }

  #hasDisk(name: string): boolean {
    return this.#catalog.list('disk').some((disk) => disk.name === name)
  }

  #checked(name: string, disks: readonly string[]): readonly string[] {
    if (disks.length === 0)
      throw new BlockError('invalid-argument', `machine ${name} would have no disk: varve machine remove ${name}`)
    for (const [index, disk] of disks.entries()) {
      if (disks.indexOf(disk) < index) throw new BlockError('invalid-argument', `disk ${disk} is named twice`)
      if (!this.#hasDisk(disk))
        throw new BlockError('not-found', `there is no disk ${disk}: varve disk list shows those there are`)
      const other = machineOf(this.#catalog, disk)
      if (other !== undefined && other !== name)
        throw new BlockError('busy', `disk ${disk} is of machine ${other}: varve machine remove ${other} ${disk}`)
    }
    return disks
  }

  async #put(record: MachineRecord): Promise<Machine> {
    await this.#commit([{ put: 'machine', record }])
    return shown(record)
  }
}

/** The name of the machine that a disk is of; undefined for a disk by itself. */
export function machineOf(catalog: Pick<Catalog, 'list'>, disk: string): string | undefined {
  return catalog.list('machine').find(({ disks }) => disks.includes(disk))?.id
}

/** The machines whose guests are frozen for a moment of these disks, or of a machine, in the order of their names: those that have hooks. */
export function guestsOf(catalog: Pick<Catalog, 'list'>, disks: readonly string[], machine?: string): string[] {
  const concerned = catalog
    .list('machine')
    .filter(
      ({ hooks, ...one }) =>
        hooks !== undefined && (one.id === machine || one.disks.some((disk) => disks.includes(disk))),
    )
  return concerned.map(({ id }) => id).toSorted()
}

function shown({ id, qemu: _qemu, ...rest }: MachineRecord): Machine {
  return { name: id, ...rest }
}
