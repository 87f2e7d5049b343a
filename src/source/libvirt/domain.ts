// A machine as libvirt describes it (formatdomain in libvirt): its disks, and what can be done with each. A disk is called after its target, which
// is how libvirt's own commands call it.

import { childOf, childrenIn, parseXml, type XmlElement } from './xml.ts'
import type { Virsh } from './virsh.ts'

/** How what changes in a disk is known, or why it is not backed up. */
export type DomainTreatment =
  /** By libvirt's checkpoints, which are in its image. */
  | { readonly kind: 'persistent' }
  /** Not at all: each backup is a full by comparison. */
  | { readonly kind: 'compared'; readonly reason: string }
  | { readonly kind: 'skipped'; readonly reason: string }

export interface DomainDisk {
  /** Its target, such as "vda". */
  readonly name: string
  readonly format: string
  /** The image or device of this host that it is; else what it is, such as "rbd pool/image". */
  readonly file: string
  /** A file or block device of this host. */
  readonly isLocal: boolean
  /** What a block job of libvirt's does to it now, such as "copy". */
  readonly job: string | undefined
  readonly treatment: DomainTreatment
}

export interface Domain {
  readonly name: string
  readonly isRunning: boolean
  /** It has the channel of a guest agent. */
  readonly hasAgent: boolean
  readonly disks: readonly DomainDisk[]
}

/** Asks for it. Kinds of asking; 'protocol' for what is no description. */
export async function readDomain(virsh: Virsh): Promise<Domain> {
  return domainOf(await virsh.ask('dumpxml'))
}

/** Of what `virsh dumpxml` prints. */
export function domainOf(text: string): Domain {
  const domain = parseXml(text)
  const channels = childrenIn(domain, 'devices', 'channel')
  return {
    name: childOf(domain, 'name')?.text ?? '',
    isRunning: domain.attributes.has('id'),
    hasAgent: channels.some((one) => childOf(one, 'target')?.attributes.get('name') === 'org.qemu.guest_agent.0'),
    disks: childrenIn(domain, 'devices', 'disk').map(diskOf),
  }
}

/** Bytes of each disk by its target; those without a medium are not there. */
export async function readSizes(virsh: Virsh): Promise<ReadonlyMap<string, number>> {
  const rows = (await virsh.ask('domblkinfo', ['--all'])).split('\n').map((line) => line.trim().split(/\s+/))
  return new Map(
    rows.flatMap(([target = '', capacity = '']): [string, number][] =>
      /^\d+$/.test(capacity) ? [[target, Number(capacity)]] : [],
    ),
  )
}

const NO_PLACE = 'has no place for a bitmap, which libvirt’s checkpoints are made of'

/** Of an image of qcow2 whose version is not the third. */
export const OLD_QCOW2: DomainTreatment = { kind: 'compared', reason: `version 2 of qcow2 ${NO_PLACE}` }

function diskOf(disk: XmlElement): DomainDisk {
  const format = childOf(disk, 'driver')?.attributes.get('type') ?? 'raw'
  const source = childOf(disk, 'source')
  const local = source?.attributes.get('file') ?? source?.attributes.get('dev')
  const { protocol, name, pool, volume } = Object.fromEntries(source?.attributes ?? [])
  const elsewhere = [protocol ?? pool, name ?? volume].filter((part) => part !== undefined).join(' ')
  return {
    name: childOf(disk, 'target')?.attributes.get('dev') ?? '',
    format: source === undefined ? '' : format,
    file: local ?? elsewhere,
    isLocal: local !== undefined,
    job: childOf(disk, 'mirror')?.attributes.get('job'),
    treatment: treatmentOf(disk, source, format),
  }
}

function treatmentOf(disk: XmlElement, source: XmlElement | undefined, format: string): DomainTreatment {
  const skipped = (reason: string): DomainTreatment => ({ kind: 'skipped', reason })
  const device = disk.attributes.get('device') ?? 'disk'
  const isRemovable = device !== 'disk' && device !== 'lun'
  if (source === undefined) return skipped('the drive is empty')
  if (childOf(disk, 'readonly') !== undefined) return skipped(isRemovable ? 'a read-only medium' : 'read-only')
  if (isRemovable) return skipped(`a ${device}`)
  if (childOf(disk, 'transient') !== undefined) return skipped('transient: what is written goes when the machine ends')
  if (format === 'qcow2') return { kind: 'persistent' }
  return { kind: 'compared', reason: `${format} ${NO_PLACE}` }
}
