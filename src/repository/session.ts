// Who is at work in a repository. Everybody who writes has a session object for as long as that lasts, so that a pruning knows
// whom it has to wait for; and a beat beside it, renewed at times, so that the dead can be told from the slow.
//
//   sessions/ID          put first, removed last: what it is, and which backups it needs: those it makes incrementals of, or restores
//   sessions/ID.N        the Nth beat: which marks it knows (see inventory.ts). The newest one's age is the session's silence
//
// A session that was silent for too long is fenced: its backup's manifest gets an object in its place that is none, so that
// it can never become visible. A store makes an object once only, so one of the two is first and the other hears of it: no
// clock, however wrong, makes a visible backup of one that was not waited for. Clocks say only when patience ends.

import { LEASE_BEAT_MS, LEASE_MS, RESTORE_LEASE_MS, STORE_REQUESTS } from '../base/limits.ts'
import { BlockError, isBlockError } from '../block/error.ts'
import { forgetBackup } from './backups.ts'
import { decodeManifest, encodeFence } from './manifest.ts'
import { inParallel } from './parallel.ts'
import { sealFor, unsealFor } from './sealed.ts'
import { fitted, isId, isListOf, isOneOf, isText, type Shape } from './shape.ts'
import { BACKUPS, FORMAT_VERSION, SESSIONS } from './spec.ts'
import type { ObjectStore } from './store.ts'
import type { Vault } from './vault.ts'

const KINDS = ['backup', 'prune', 'restore'] as const

/** What a session object holds, and each of its beats. */
interface SessionRecord {
  readonly format: typeof FORMAT_VERSION
  /** A backup's, or one of the same form. */
  readonly id: string
  readonly kind: (typeof KINDS)[number]
  /** For people: host and process. */
  readonly holder: string
  /** Backups that must not go while this lasts. */
  readonly parents: readonly string[]
  /** Marks whose packs it does not rely on. */
  readonly seen: readonly string[]
}

const RECORD: Shape<SessionRecord> = {
  format: isOneOf(FORMAT_VERSION),
  id: isId,
  kind: isOneOf(...KINDS),
  holder: isText,
  parents: isListOf(isId),
  seen: isListOf(isText),
}

/** A session as others see it. */
export interface SeenSession extends Pick<SessionRecord, 'id' | 'holder' | 'seen' | 'parents'> {
  readonly kind: SessionRecord['kind'] | 'unreadable'
  /** Milliseconds since its newest beat, by the store's clock. */
  readonly silentMs: number
  readonly keys: readonly string[]
}

export interface SessionPlace {
  readonly store: ObjectStore
  readonly vault: Vault
  /** For people: who holds it. */
  readonly holder: string
}

/** How long each kind may be silent unless told, in milliseconds. A restore outlives its daemon, which may be down for some days. */
const LEASES: Readonly<Record<SeenSession['kind'], number>> = {
  backup: LEASE_MS,
  prune: LEASE_MS,
  restore: RESTORE_LEASE_MS,
  unreadable: LEASE_MS,
}

interface NewSession {
  readonly id: string
  readonly kind: SessionRecord['kind']
  readonly parents?: readonly string[]
}

/** One's own session, from begin to end. */
export class Session {
  readonly id: string
  readonly #place: SessionPlace
  #record: SessionRecord
  #beat = 0
  #isAbandoned = false
  #beating: Promise<void> | undefined
  readonly #timer: NodeJS.Timeout

  private constructor(place: SessionPlace, record: SessionRecord) {
    this.id = record.id
    this.#place = place
    this.#record = record
    this.#timer = setInterval(() => void this.#renew(), LEASE_BEAT_MS)
    this.#timer.unref()
  }

  static async begin(place: SessionPlace, made: NewSession): Promise<Session> {
    const record = recordOf(place, made)
    await putRecord(place, SESSIONS + made.id, record)
    return new Session(place, record)
  }

  /** The same for a session that an earlier process left behind, whether or not it was given up since. */
  static async takeOver(place: SessionPlace, made: NewSession): Promise<Session> {
    const { store } = place
    const record = recordOf(place, made)
    try {
      await putRecord(place, SESSIONS + made.id, record)
    } catch (error) {
      if (!isBlockError(error, 'exists')) throw error
    }
    const session = new Session(place, record)
    const beats = (await store.list(SESSIONS)).filter((key) => key.startsWith(`${SESSIONS}${made.id}.`))
    session.#beat = Math.max(0, ...beats.map((key) => Number(key.split('.').at(-1))))
    try {
      await session.#put()
      for (const key of beats) await store.remove(key)
    } catch (error) {
      session.abandon()
      throw error
    }
    return session
  }

  /** From now on nothing is relied on that these marks name. */
  async sees(marks: readonly string[]): Promise<void> {
    if (marks.length === 0) return
    await this.#beating
    this.#record = { ...this.#record, seen: marks }
    await this.#put()
  }

  /** Takes the session away. What cannot be removed is left for a pruning: it finds that the backup is visible or dead. */
  async end(): Promise<void> {
    clearInterval(this.#timer)
    await this.#beating
    if (this.#isAbandoned) return
    const { store } = this.#place
    try {
      // The session goes last: while it is listed its beats are not taken for its own silence.
      for (let beat = Math.max(1, this.#beat - 1); beat <= this.#beat; beat++) await store.remove(this.#key(beat))
      await store.remove(SESSIONS + this.id)
    } catch {
      // A store may refuse its clients to remove anything, and then it is not their task.
    }
  }

  /**
   * To be asked when a part of the backup has been made visible, and before anybody relies on it. Kind 'timeout' when a pruning has given the
   * session up by then, which may have removed what the part needs: the part is forgotten.
   */
  async confirm(part: string): Promise<void> {
    const { store } = this.#place
    if ((await store.status(BACKUPS + this.id)) === undefined) return
    await forgetBackup(this.#place, part)
    const message = `backup ${this.id} was silent for so long that a pruning gave it up: make it again`
    throw new BlockError('timeout', message)
  }

  /** Leaves the session as it is: a pruning waits for it until its time is over, and then fences it. */
  abandon(): void {
    clearInterval(this.#timer)
    this.#isAbandoned = true
  }

  /** A beat that fails is tried again at the next: only a long silence counts. */
  async #renew(): Promise<void> {
    this.#beating ??= this.#put()
      .catch(() => undefined)
      .finally(() => (this.#beating = undefined))
    await this.#beating
  }

  async #put(): Promise<void> {
    const last = this.#beat++
    await putRecord(this.#place, this.#key(this.#beat), this.#record)
    if (last > 0) await this.#place.store.remove(this.#key(last))
  }

  #key(beat: number): string {
    return `${SESSIONS}${this.id}.${String(beat).padStart(8, '0')}`
  }
}

/** All sessions, the caller's too. `nowMs` is the store's clock. */
export async function listSessions({ store, vault }: SessionPlace, nowMs: number): Promise<SeenSession[]> {
  const beats = new Map<string, string[]>()
  for (const key of await store.list(SESSIONS)) {
    const id = key.slice(SESSIONS.length).split('.')[0] as string
    const keys = beats.get(id) ?? []
    keys.push(key)
    beats.set(id, keys)
  }
  const sessions: SeenSession[] = []
  await inParallel([...beats], STORE_REQUESTS, async ([id, keys]) => {
    const records: SessionRecord[] = []
    let silentMs = Number.POSITIVE_INFINITY
    let isThere = false
    for (const key of keys) {
      try {
        const record = fitted(RECORD, unsealFor(vault, key, await store.get(key), key), key)
        const status = await store.status(key)
        records.push(record)
        silentMs = Math.min(silentMs, nowMs - (status?.createdMs ?? nowMs))
        isThere = true
      } catch (error) {
        if (isBlockError(error, 'not-found')) continue
        // Damage says nothing of whether somebody lives: it counts as one who knows no marks, until it is old enough.
        if (!isBlockError(error, 'corrupt') && !isBlockError(error, 'invalid-format')) throw error
        isThere = true
        silentMs = Math.min(silentMs, nowMs - ((await store.status(key))?.createdMs ?? nowMs))
      }
    }
    if (!isThere) return
    const newest = records.at(-1)
    sessions.push({
      id,
      kind: newest?.kind ?? 'unreadable',
      holder: newest?.holder ?? 'unknown',
      parents: newest?.parents ?? [],
      seen: newest?.seen ?? [],
      silentMs,
      keys,
    })
  })
  return sessions
}

/** Kind 'busy' while another session takes things away: a pruning or a repair. `own` is the caller's. */
export async function refuseRivals(place: SessionPlace, own: string, nowMs: number, leaseMs?: number): Promise<void> {
  for (const session of await listSessions(place, nowMs)) {
    if (session.kind !== 'prune' || session.id === own) continue
    if ((await settleSession(place, session, leaseMs)) !== 'live') continue
    throw new BlockError('busy', `${place.store.name} is being pruned by ${session.holder}: let it finish`)
  }
}

export type SessionState = 'live' | 'visible' | 'fenced'

/**
 * What has become of another's session. One that is silent for longer than `leaseMs` is fenced; those that are over are tidied
 * away. 'live' is who has to be waited for.
 */
export async function settleSession(
  place: SessionPlace,
  session: SeenSession,
  leaseMs = LEASES[session.kind],
): Promise<SessionState> {
  const { store } = place
  const state = await stateOf(place, session, leaseMs)
  if (state === 'live') return state
  for (const key of [...session.keys].reverse()) await store.remove(key)
  return state
}

async function stateOf(place: SessionPlace, session: SeenSession, leaseMs: number): Promise<SessionState> {
  const { store, vault } = place
  const published = await placeTaken(place, session)
  if (published !== undefined) return published
  if (leaseMs > 0 && session.silentMs < leaseMs) return 'live'
  // Neither makes anything visible.
  if (session.kind === 'prune' || session.kind === 'restore' || !isId(session.id)) return 'fenced'
  try {
    await store.put(BACKUPS + session.id, [encodeFence(vault, session.id)])
    return 'fenced'
  } catch (error) {
    if (isBlockError(error, 'exists')) return (await placeTaken(place, session)) ?? 'visible'
    throw error
  }
}

async function placeTaken({ store, vault }: SessionPlace, { id }: SeenSession): Promise<SessionState | undefined> {
  if (!isId(id)) return undefined
  try {
    return decodeManifest(vault, await store.get(BACKUPS + id), id, store.name) === undefined ? 'fenced' : 'visible'
  } catch (error) {
    if (isBlockError(error, 'not-found')) return undefined
    // Whatever it is, it is in the place of the manifest: nobody else can put one there.
    if (isBlockError(error, 'corrupt') || isBlockError(error, 'invalid-format')) return 'visible'
    throw error
  }
}

function recordOf({ holder }: SessionPlace, { id, kind, parents = [] }: NewSession): SessionRecord {
  return { format: FORMAT_VERSION, id, kind, holder, parents, seen: [] }
}

function putRecord({ store, vault }: SessionPlace, key: string, record: SessionRecord): Promise<void> {
  return store.put(key, [sealFor(vault, key, record)])
}
