// libvirt's checkpoints of a machine (formatcheckpoint in libvirt): moments, each with a bitmap in the images that records since then. Those of
// Varve's are called as its bitmaps are (../qemu/names.ts), so the backup that each belongs to is known by its name.

import { type BlockError, isBlockError } from '../../block/error.ts'
import type { Virsh } from './virsh.ts'
import { childrenIn, escapeXml, parseXml, xml } from './xml.ts'

export interface Checkpoint {
  readonly name: string
  /** Targets of the disks whose changes since then are known. */
  readonly whole: ReadonlySet<string>
  /** Of those whose bitmap is gone or inconsistent. */
  readonly broken: ReadonlySet<string>
}

/** The checkpoints whose names are wanted. Kinds of asking. */
export async function readCheckpoints(virsh: Virsh, isWanted: (name: string) => boolean): Promise<Checkpoint[]> {
  const names = (await virsh.ask('checkpoint-list', ['--name'])).split('\n').map((line) => line.trim())
  const found: Checkpoint[] = []
  for (const name of names.filter((one) => one !== '' && isWanted(one))) {
    // With sizes: to know them libvirt looks at the bitmaps, and says none of a bitmap that is not whole.
    const said = await virsh.ask('checkpoint-dumpxml', ['--checkpointname', name, '--size', '--no-domain'])
    found.push({ name, ...checkpointDisks(said) })
  }
  return found
}

/** Of what `virsh checkpoint-dumpxml --size` prints. */
export function checkpointDisks(text: string): Pick<Checkpoint, 'whole' | 'broken'> {
  const disks = childrenIn(parseXml(text), 'disks', 'disk')
  const marked = disks.filter(({ attributes }) => attributes.get('checkpoint') === 'bitmap')
  const targets = (isWhole: boolean): ReadonlySet<string> => {
    const chosen = marked.filter(({ attributes }) => attributes.has('size') === isWhole)
    return new Set(chosen.map(({ attributes }) => attributes.get('name') ?? ''))
  }
  return { whole: targets(true), broken: targets(false) }
}

/** A checkpoint of these disks of all, which are named by their targets. */
export function checkpointXml(name: string, all: readonly string[], marked: ReadonlySet<string>): string {
  const disks = all.map((target) => xml('disk', { name: target, checkpoint: marked.has(target) ? 'bitmap' : 'no' }))
  return xml('domaincheckpoint', {}, xml('name', {}, escapeXml(name)) + xml('disks', {}, disks.join('')))
}

/** Deletes one, also whose bitmap is gone already. */
export async function deleteCheckpoint(virsh: Virsh, name: string): Promise<void> {
  try {
    await virsh.ask('checkpoint-delete', ['--checkpointname', name])
  } catch (error) {
    if (!isBlockError(error) || !isBitmapGone(error)) throw error
    await virsh.ask('checkpoint-delete', ['--checkpointname', name, '--metadata'])
  }
}

function isBitmapGone({ message }: BlockError): boolean {
  return /bitmap .* not found/.test(message)
}
