// The catalog as a shard sees it: a copy in memory that the control plane keeps up to date, and commits that it makes. Only the
// control plane has the file. A commit shows in the copy at once and is taken back when it fails.

import { type Catalog, type CatalogChange, RECORD_KINDS, type RecordKind, type Records } from '../engine/catalog.ts'

export type AnyRecord = { [K in RecordKind]: { readonly kind: K; readonly record: Records[K] } }[RecordKind]

/** What a new shard is given. */
export function allRecords(catalog: Pick<Catalog, 'list'>): AnyRecord[] {
  return RECORD_KINDS.flatMap((kind) => catalog.list(kind).map((record) => ({ kind, record }) as AnyRecord))
}

export class CatalogMirror implements Catalog {
  readonly #records = new Map<string, AnyRecord>()
  readonly #commit: (changes: readonly CatalogChange[]) => Promise<void>

  /** `commit` makes the changes durable; `records` is what the catalog holds now. */
  constructor(commit: (changes: readonly CatalogChange[]) => Promise<void>, records: readonly AnyRecord[]) {
    this.#commit = commit
    for (const one of records) this.#records.set(`${one.kind}/${one.record.id}`, one)
  }

  list<K extends RecordKind>(kind: K): Records[K][] {
    return [...this.#records.values()].filter((one) => one.kind === kind).map((one) => one.record as Records[K])
  }

  get<K extends RecordKind>(kind: K, id: string): Records[K] | undefined {
    return this.#records.get(`${kind}/${id}`)?.record as Records[K] | undefined
  }

  async commit(changes: readonly CatalogChange[]): Promise<void> {
    const before = changes.map((change) => this.#records.get(keyOf(change)))
    this.apply(changes)
    try {
      await this.#commit(changes)
    } catch (error) {
      changes.forEach((change, index) => {
        const old = before[index]
        if (old === undefined) this.#records.delete(keyOf(change))
        else this.#records.set(keyOf(change), old)
      })
      throw error
    }
  }

  /** Somebody else's commit. */
  apply(changes: readonly CatalogChange[]): void {
    for (const change of changes) {
      if ('put' in change) this.#records.set(keyOf(change), { kind: change.put, record: change.record } as AnyRecord)
      else this.#records.delete(keyOf(change))
    }
  }

  close(): void {}
}

function keyOf(change: CatalogChange): string {
  return 'put' in change ? `${change.put}/${change.record.id}` : `${change.remove}/${change.id}`
}
