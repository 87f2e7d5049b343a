// The catalog in a file, by node:sqlite: one table of JSON records, a transaction for each commit, synced before it returns.

import { DatabaseSync } from 'node:sqlite'
import { BlockError, type ErrorKind, toBlockError } from '../block/error.ts'
import type { Catalog, CatalogChange, RecordKind, Records } from './catalog.ts'

const VERSION = 1

/** Kinds of SQLite's primary result codes (sqlite.org/rescode.html); of the others it is 'io'. */
const KINDS: Readonly<Record<number, ErrorKind>> = {
  5: 'busy', // SQLITE_BUSY
  8: 'read-only', // SQLITE_READONLY
  11: 'corrupt', // SQLITE_CORRUPT
  13: 'no-space', // SQLITE_FULL
  26: 'corrupt', // SQLITE_NOTADB
}

export class SqliteCatalog implements Catalog {
  readonly #path: string
  readonly #db: DatabaseSync

  /** Opens or makes the catalog at `path`. Kinds 'invalid-format' when a newer Varve wrote it, 'corrupt'. */
  constructor(path: string) {
    this.#path = path
    this.#db = this.#try('open', () => new DatabaseSync(path))
    this.#try('open', () => {
      this.#db.exec('PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA busy_timeout = 5000')
      const found = Number(this.#db.prepare('PRAGMA user_version').get()?.['user_version'] ?? 0)
      if (found > VERSION) {
        const message = `${path} was written by a newer Varve (catalog version ${found}; this one reads up to ${VERSION}): run that Varve`
        throw new BlockError('invalid-format', message, { path })
      }
      this.#db.exec(
        'CREATE TABLE IF NOT EXISTS records (kind TEXT NOT NULL, id TEXT NOT NULL, body TEXT NOT NULL, UNIQUE (kind, id))',
      )
      this.#db.exec(`PRAGMA user_version = ${VERSION}`)
    })
  }

  list<K extends RecordKind>(kind: K): Records[K][] {
    return this.#try('list', () =>
      this.#db
        .prepare('SELECT body FROM records WHERE kind = ? ORDER BY rowid')
        .all(kind)
        .map((row) => JSON.parse(String(row['body'])) as Records[K]),
    )
  }

  get<K extends RecordKind>(kind: K, id: string): Records[K] | undefined {
    return this.#try('get', () => {
      const row = this.#db.prepare('SELECT body FROM records WHERE kind = ? AND id = ?').get(kind, id)
      return row === undefined ? undefined : (JSON.parse(String(row['body'])) as Records[K])
    })
  }

  async commit(changes: readonly CatalogChange[]): Promise<void> {
    this.#try('commit', () => {
      this.#db.exec('BEGIN IMMEDIATE')
      try {
        const put = this.#db.prepare(
          'INSERT INTO records (kind, id, body) VALUES (?, ?, ?) ON CONFLICT (kind, id) DO UPDATE SET body = excluded.body',
        )
        const remove = this.#db.prepare('DELETE FROM records WHERE kind = ? AND id = ?')
        for (const change of changes) {
          if ('put' in change) put.run(change.put, change.record.id, JSON.stringify(change.record))
          else remove.run(change.remove, change.id)
        }
        this.#db.exec('COMMIT')
      } catch (error) {
        this.#db.exec('ROLLBACK')
        throw error
      }
    })
  }

  close(): void {
    this.#db.close()
  }

  #try<T>(doing: string, call: () => T): T {
    try {
      return call()
    } catch (error) {
      throw this.#failure(error, doing)
    }
  }

  #failure(error: unknown, doing: string): BlockError {
    if (error instanceof BlockError) return error
    const place = { path: this.#path }
    const { errcode } = error as { errcode?: number }
    // A record that is no JSON was damaged too.
    const kind = error instanceof SyntaxError ? 'corrupt' : errcode === undefined ? undefined : KINDS[errcode & 0xff]
    if (kind === undefined) return toBlockError(error, `catalog ${this.#path}: ${doing}`, place)
    const remedy = kind === 'corrupt' ? `: move it away and add the disks again, their images are not in it` : ''
    const message = `catalog ${this.#path} cannot be read or written (${(error as Error).message})${remedy}`
    return new BlockError(kind, message, place, error)
  }
}
