// Who may serve a disk for writing, while it migrates and after: the marks in its record, what is refused because of them, and what an
// operator is told, with the one command that ends the state. docs/internals/migration.md says why there are never two.

import { randomBytes } from 'node:crypto'
import { BlockError } from '../block/error.ts'
import type { Catalog, DiskRecord } from './catalog.ts'

/** At a target: the disk is being copied to here, and nobody but the token's holder may use it. */
export interface IncomingMark {
  readonly token: string
  /** Where it comes from, for people. */
  readonly from: string
  /** All of it is here. */
  readonly sealed: boolean
}

/** At a source: the disk is not ours any more, or may not be. */
export interface AwayMark {
  readonly state: 'handed-over' | 'moved'
  readonly token: string
  /** The URI of the target's API, and the identity of its home. */
  readonly to: string
  readonly home: string
  /** Bytes. */
  readonly size: number
  /** Its guests are passed on. */
  readonly forward: boolean
}

/** What makes the record of a disk one that others than its guests have a say in. */
export type Authority =
  | { readonly state: 'here' }
  | { readonly state: 'incoming'; readonly mark: IncomingMark }
  | { readonly state: 'handed-over' | 'moved'; readonly mark: AwayMark }

export function authorityOf({ incoming, away }: DiskRecord): Authority {
  if (incoming !== undefined) return { state: 'incoming', mark: incoming }
  return away === undefined ? { state: 'here' } : { state: away.state, mark: away }
}

/** The disk that a token brings, or brought, here. */
export function diskOfToken(catalog: Pick<Catalog, 'list'>, token: string): DiskRecord | undefined {
  return catalog.list('disk').find(({ incoming, arrival }) => incoming?.token === token || arrival?.token === token)
}

/** Whether guests may find the disk here: it is ours, or passed on, and nobody restores onto it. */
export function isServed({ incoming, away, overwriting }: DiskRecord): boolean {
  if (overwriting !== undefined) return false
  return incoming === undefined && (away === undefined || (away.state === 'moved' && away.forward))
}

/** What is so, and what ends it; undefined for a disk that is all ours. */
export function migrationNote(record: DiskRecord): string | undefined {
  const { name, arrival } = record
  const settle = `varve migrate ${name} --settle`
  const authority = authorityOf(record)
  switch (authority.state) {
    case 'here':
      if (arrival === undefined) return undefined
      return `arrived from ${arrival.from}, which may pass its guests on: varve disk remove ${name} there ends that`
    case 'incoming': {
      const { from, sealed } = authority.mark
      if (!sealed) return `arrives from ${from}, where its guests are: to give the copy up, varve disk remove ${name}`
      return `all of it is here, and ${from} has not said that it is ours: ${settle} there; if that host is lost for ever, ${settle} --force here`
    }
    case 'handed-over':
      return `handed over to ${authority.mark.to}, whose answer is not known, so nobody writes here: ${settle}`
    case 'moved': {
      const is = authority.mark.forward ? 'is served there, and passed on from here' : 'is served there alone'
      return `moved to ${authority.mark.to}, ${is}: varve disk remove ${name} forgets it here`
    }
  }
}

/** Kind 'busy' unless the disk is all ours. */
export function refuseAway(record: DiskRecord): void {
  if (record.incoming === undefined && record.away === undefined) return
  throw new BlockError('busy', `disk ${record.name}: ${migrationNote(record)}`, { device: record.name })
}

/** Kind 'busy' for a disk whose record another daemon may still ask about: without it there could be two writers. */
export function refuseUnsettled(record: DiskRecord): void {
  const { name, arrival, away } = record
  const isFinal = away?.state === 'moved' || (arrival === undefined && away === undefined)
  if (isFinal) return
  const remedy =
    arrival === undefined ? '' : `; if that host is lost for ever, varve migrate ${name} --settle --force here`
  throw new BlockError('busy', `disk ${name} cannot be removed yet: ${migrationNote(record)}${remedy}`, {
    device: name,
  })
}

/** The home's identity, once and for all; made when there is none yet. */
export async function ensureIdentity(catalog: Catalog): Promise<void> {
  if (catalog.get('identity', HOME) !== undefined) return
  await catalog.commit([
    { put: 'identity', record: { id: HOME, identity: randomBytes(16).toString('hex'), createdMs: Date.now() } },
  ])
}

/** A number that no other home has. */
export function identityOf(catalog: Pick<Catalog, 'get'>): string {
  const found = catalog.get('identity', HOME)
  if (found !== undefined) return found.identity
  throw new BlockError('corrupt', 'the catalog has no identity of its home: start the daemon anew')
}

const HOME = 'home'
