// What Varve leaves in a QEMU has names that begin with "varve-", so that whatever a crash left behind is recognised at the next contact.
// Nodes and exports carry the tag of their machine, since a node's name has 31 characters at most; bitmaps outlive QEMU in the image, and
// carry the machine's name and which backup in which repository they count from.
//
//   node, export   varve-TAG-MOMENT-ROLEn      varve-3f9a1c-mbx2k1q0-c0
//   bitmap         varve-MACHINE-REPOSITORY-BACKUP      varve-web1-5d0c4e2a-20261123T224403000Z-1a2b3c4d

import { randomBytes } from 'node:crypto'

/**
 * The nodes of a moment, of each disk: what the guest's device is led through, what saves old data before it is overwritten, where that goes,
 * the view of the moment, and its export.
 */
export type NodeRole = 'anchor' | 'filter' | 'scratch' | 'view' | 'export'

const LETTERS: Readonly<Record<NodeRole, string>> = { anchor: 'a', filter: 'c', scratch: 's', view: 'v', export: 'e' }

/** Distinguishes machines, in the names of their nodes. */
export function newTag(): string {
  return randomBytes(3).toString('hex')
}

/** The beginning of the names of all nodes and exports of a machine. */
export function nodePrefix(tag: string): string {
  return `varve-${tag}-`
}

/** The names of one moment, of the disk with this number. */
export function nodeNames(tag: string, momentMs: number): (role: NodeRole, disk: number) => string {
  const prefix = `${nodePrefix(tag)}${momentMs.toString(36)}-`
  return (role, disk) => `${prefix}${LETTERS[role]}${disk}`
}

/** What a node of ours is for; undefined for another's. */
export function roleOf(tag: string, node: string): NodeRole | undefined {
  if (!node.startsWith(nodePrefix(tag))) return undefined
  const letter = /-([a-z])\d+$/.exec(node)?.[1]
  return (Object.keys(LETTERS) as NodeRole[]).find((role) => LETTERS[role] === letter)
}

/** The beginning of the names of a machine's bitmaps, for one repository (by its id) or for all. */
export function bitmapPrefix(machine: string, repository?: string): string {
  return repository === undefined ? `varve-${machine}-` : `varve-${machine}-${repository.slice(0, 8)}-`
}

/** The bitmap that says what changed since a backup. */
export function bitmapName(machine: string, repository: string, backup: string): string {
  return bitmapPrefix(machine, repository) + backup
}

/** The bits of a moment, as its backup reads them; it goes with the moment. */
export function frozenName(machine: string, repository: string, backup: string): string {
  return `${bitmapName(machine, repository, backup)}.frozen`
}

/** Whether a bitmap is of a machine, and of no other whose name begins alike. */
export function isBitmapOf(machine: string, bitmap: string): boolean {
  const rest = bitmap.startsWith(bitmapPrefix(machine)) ? bitmap.slice(bitmapPrefix(machine).length) : ''
  return /^[0-9a-f]{8}-\d{8}T\d{9}Z-[0-9a-f]{8}(\.frozen)?$/.test(rest)
}
