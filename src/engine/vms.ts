// The machines that run in QEMUs of their own, by their monitors or by libvirt: which there are, and what Varve can do with their disks. Each is a machine of
// the catalog without disks of Varve's. How they are backed up is elsewhere (qemu-backup.ts).

import { GUEST_FREEZE_MS } from '../base/limits.ts'
import { QMP_LOOK_MS } from '../base/qemu-limits.ts'
import type { Mutex } from '../base/mutex.ts'
import { BlockError, isBlockError } from '../block/error.ts'
import type { GuestHooks } from '../guest/guest-hooks.ts'
import type { Host } from '../host/host.ts'
import { readCheckpoints } from '../source/libvirt/checkpoints.ts'
import { type DomainPlace, Virsh } from '../source/libvirt/virsh.ts'
import { disksOf, readGraph } from '../source/qemu/block-graph.ts'
import { isBitmapOf, newTag } from '../source/qemu/names.ts'
import type { QmpClient } from '../source/qemu/qmp-client.ts'
import type { Catalog, CatalogChange, MonitorPlace } from './catalog.ts'
import { checkName } from './context.ts'
import { clearDomain, findDomain, tidyDomain } from './domain-contact.ts'
import type { Home } from './home.ts'
import {
  type DomainRecord,
  isDomain,
  jobOf,
  type QemuMachineRecord,
  refuseBusy,
  refuseVmJob,
  tidyQemu,
  vmOf,
  type VmRecord,
  withQemu,
} from './qemu-contact.ts'

/** Where a machine is, and how its guest is frozen for a moment. */
export type VmRequest = {
  readonly name: string
  /** Milliseconds that the guest may be frozen. */
  readonly freezeMs?: number | undefined
} & (
  | {
      /** Absolute paths of sockets: of QEMU's -qmp, and of the guest agent. */
      readonly qmp: string
      readonly agent?: string | undefined
    }
  | {
      readonly libvirt: DomainPlace
      /** By the guest's agent, which libvirt asks. */
      readonly freezes?: boolean | undefined
    }
)

export interface VmDisk {
  readonly name: string
  readonly size: number
  readonly format: string
  readonly file: string
  /** What becomes of it in a backup: its changes are recorded in the image, or as long as QEMU lives, or not; or it is left out; and why. */
  readonly bitmap: 'persistent' | 'transient' | 'compared' | 'skipped'
  readonly reason?: string
  /** Bitmaps of Varve's that it has, or checkpoints. */
  readonly bitmaps: readonly string[]
}

export interface Vm {
  readonly name: string
  /** One of the two. */
  readonly qmp?: string
  readonly libvirt?: DomainPlace
  readonly agent?: string
  readonly state: 'running' | 'away'
  /** Why QEMU cannot be asked. */
  readonly error?: string
  readonly version?: string
  readonly disks: readonly VmDisk[]
  /** What an earlier backup had left in it, which is gone now. */
  readonly removed: readonly string[]
}

export interface VmsOptions {
  readonly catalog: Pick<Catalog, 'get' | 'list'>
  readonly commit: (changes: readonly CatalogChange[]) => Promise<void>
  /** Held by whatever adds or removes disks and machines. */
  readonly control: Mutex
  readonly home: Home
  readonly host: Host
}

export class Vms {
  readonly #options: VmsOptions

  constructor(options: VmsOptions) {
    this.#options = options
  }

  /** Each with what its QEMU says now. */
  list(): Promise<Vm[]> {
    return Promise.all(this.#records().map((record) => this.#look(record)))
  }

  /** Kind 'not-found' when there is none of that name. */
  show(name: string): Promise<Vm> {
    return this.#look(this.#find(name))
  }

  /**
   * Takes a machine in that runs. Kinds 'exists' for a name in use, 'unsupported' for a QEMU that is too old, and of reaching it: 'not-found' when
   * nobody listens there, 'protocol' for what is no QMP, 'timeout' when it says nothing; of libvirt's, 'not-found' without virsh or such
   * a domain, 'closed' when it does not run.
   */
  add(request: VmRequest): Promise<Vm> {
    return this.#options.control.run(async () => {
      const { name } = request
      checkName('machine', name)
      const { catalog, commit } = this.#options
      if (catalog.get('machine', name) !== undefined || catalog.list('disk').some((disk) => disk.name === name))
        throw new BlockError('exists', `there is a machine or disk ${name} already: give this one another name`)
      const qemu = 'qmp' in request ? { qmp: request.qmp, tag: newTag() } : request.libvirt
      const other = this.#records().find((record) => isSame(record.qemu, qemu))
      if (other !== undefined) throw new BlockError('exists', `${placeName(qemu)} machine ${other.id} already`)
      const hooks = hooksOf(request)
      const record = { id: name, disks: [], qemu, ...(hooks && { hooks }) } as VmRecord
      const found = await this.#ask(record)
      if (isDomain(record) && hooks !== undefined) await this.#checkAgent(record)
      await commit([{ put: 'machine', record }])
      return found
    })
  }

  /** Forgets it, with what Varve has in its QEMU, its bitmaps too; what cannot be reached now stays. Kind 'busy' while it is backed up. */
  remove(name: string): Promise<{ readonly left?: string }> {
    return this.#options.control.run(async () => {
      const record = this.#find(name)
      const { catalog, commit, home } = this.#options
      refuseBusy(catalog, name)
      let left: { readonly left?: string } = {}
      try {
        if (isDomain(record)) await clearDomain(new Virsh(record.qemu), name, home.qemuSocket(name))
        else
          await withQemu(record, async (client) => {
            await tidyQemu(client, record, home)
            await removeBitmaps(client, record)
          })
      } catch (error) {
        if (!isBlockError(error)) throw error
        left = { left: `its bitmaps stay in its images, since it could not be asked: ${error.message}` }
      }
      await commit([
        { remove: 'machine', id: name },
        { remove: 'forecast', id: name },
      ])
      return left
    })
  }

  #records(): VmRecord[] {
    const { catalog } = this.#options
    return catalog.list('machine').flatMap(({ id }) => vmOf(catalog, id) ?? [])
  }

  #find(name: string): VmRecord {
    const record = vmOf(this.#options.catalog, name)
    if (record !== undefined) return record
    throw new BlockError('not-found', `there is no machine ${name} of QEMU's: varve vm list shows those there are`)
  }

  async #look(record: VmRecord): Promise<Vm> {
    try {
      return await this.#ask(record)
    } catch (error) {
      if (!isBlockError(error)) throw error
      return { ...said(record), state: 'away', error: error.message, disks: [], removed: [] }
    }
  }

  async #ask(record: VmRecord): Promise<Vm> {
    const isBusy = jobOf(this.#options.catalog, record.id) !== undefined
    refuseVmJob(this.#options.catalog, record.id)
    if (isDomain(record)) return this.#askLibvirt(record, isBusy)
    return withQemu(record, (client) => this.#askQemu(client, record, isBusy), { greetingMs: QMP_LOOK_MS })
  }

  async #askQemu(client: QmpClient, record: QemuMachineRecord, isBusy: boolean): Promise<Vm> {
    const removed = isBusy ? [] : await tidyQemu(client, record, this.#options.home)
    const disks = disksOf(await readGraph(client), record.qemu.tag)
    const { major, minor, micro } = client.version
    return {
      ...said(record),
      state: 'running',
      version: `${major}.${minor}.${micro}`,
      disks: disks.map(({ bitmaps, ...disk }) => {
        const own = bitmaps.map((bitmap) => bitmap.name).filter((bitmap) => isBitmapOf(record.id, bitmap))
        return shownDisk(disk, own)
      }),
      removed,
    }
  }

  async #askLibvirt(record: DomainRecord, isBusy: boolean): Promise<Vm> {
    const { host, home } = this.#options
    const virsh = new Virsh(record.qemu)
    const { disks } = await findDomain(virsh, host)
    const removed = isBusy ? [] : await tidyUnlessTheirs(virsh, home.qemuSocket(record.id))
    const checkpoints = await readCheckpoints(virsh, (name) => isBitmapOf(record.id, name))
    return {
      ...said(record),
      state: 'running',
      version: await virsh.version(),
      disks: disks.map((disk) => {
        const own = checkpoints.filter(({ whole }) => whole.has(disk.name)).map(({ name }) => name)
        return shownDisk(disk, own)
      }),
      removed,
    }
  }

  /** Kind 'unsupported' for a guest without an agent. */
  async #checkAgent({ qemu }: DomainRecord): Promise<void> {
    const virsh = new Virsh(qemu)
    const { hasAgent } = await findDomain(virsh, this.#options.host)
    if (hasAgent) return
    const advice = 'add one (virsh attach-device), and install qemu-guest-agent in the guest; or leave --freeze out'
    throw new BlockError('unsupported', `${virsh.name} has no channel org.qemu.guest_agent.0 to freeze by: ${advice}`)
  }
}

/** Somebody else's backup of it is no reason not to look at it. */
async function tidyUnlessTheirs(virsh: Virsh, socket: string): Promise<string[]> {
  try {
    return await tidyDomain(virsh, socket)
  } catch (error) {
    if (isBlockError(error, 'busy')) return []
    throw error
  }
}

function said(record: VmRecord): Pick<Vm, 'name' | 'qmp' | 'libvirt' | 'agent'> {
  const { id, hooks } = record
  const place = isDomain(record) ? { libvirt: record.qemu } : { qmp: record.qemu.qmp }
  return { name: id, ...place, ...(hooks?.by.kind === 'agent' ? { agent: hooks.by.socket } : {}) }
}

function shownDisk(
  disk: Pick<VmDisk, 'name' | 'size' | 'format' | 'file'> & {
    readonly treatment: { readonly kind: VmDisk['bitmap']; readonly reason?: string }
  },
  bitmaps: readonly string[],
): VmDisk {
  const { name, size, format, file, treatment } = disk
  const { kind: bitmap, reason } = treatment
  return { name, size, format, file, bitmap, ...(reason === undefined ? {} : { reason }), bitmaps }
}

function hooksOf(request: VmRequest): GuestHooks | undefined {
  const { freezeMs: limitMs = GUEST_FREEZE_MS } = request
  if ('qmp' in request)
    return request.agent === undefined ? undefined : { by: { kind: 'agent', socket: request.agent }, limitMs }
  if (request.freezes !== true) return undefined
  const { connect, domain } = request.libvirt
  const command = (verb: string): string => `virsh -q -c ${quoted(connect)} ${verb} --domain ${quoted(domain)}`
  return { by: { kind: 'commands', freeze: command('domfsfreeze'), thaw: command('domfsthaw') }, limitMs }
}

/** For a shell. */
function quoted(word: string): string {
  return `'${word.replaceAll("'", "'\\''")}'`
}

function isSame(one: MonitorPlace | DomainPlace, other: MonitorPlace | DomainPlace): boolean {
  if ('qmp' in one) return 'qmp' in other && one.qmp === other.qmp
  return 'domain' in other && one.domain === other.domain && one.connect === other.connect
}

/** The beginning of what is said of it. */
function placeName(place: MonitorPlace | DomainPlace): string {
  return 'qmp' in place ? `${place.qmp} is the monitor of` : `domain ${place.domain} at ${place.connect} is`
}

async function removeBitmaps(client: QmpClient, { id, qemu }: QemuMachineRecord): Promise<void> {
  const disks = disksOf(await readGraph(client), qemu.tag)
  const actions = disks.flatMap(({ node, bitmaps }) =>
    bitmaps
      .filter(({ name }) => isBitmapOf(id, name))
      .map(({ name }) => ({ type: 'block-dirty-bitmap-remove', data: { node, name } })),
  )
  if (actions.length > 0) await client.execute('transaction', { actions })
}
