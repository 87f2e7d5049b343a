// Who follows which job in the control plane. A shard is told to report a job's changes for as long as somebody listens.

import type { JobStatus } from '../job/job.ts'

type Listener = (status: JobStatus) => void

export class JobWatchers {
  readonly #tell: (id: string, verb: 'watchJob' | 'unwatchJob') => Promise<void>
  readonly #listeners = new Map<string, Set<Listener>>()

  /** `tell` asks the shard of a job. */
  constructor(tell: (id: string, verb: 'watchJob' | 'unwatchJob') => Promise<void>) {
    this.#tell = tell
  }

  /** Resolves when no further change is missed, with how to stop. */
  async watch(id: string, listener: Listener): Promise<() => void> {
    const listeners = this.#listeners.get(id) ?? new Set()
    listeners.add(listener)
    this.#listeners.set(id, listeners)
    // A job that is over has nothing to say, and a shard that died says no more.
    await this.#tell(id, 'watchJob').catch(() => undefined)
    return () => {
      listeners.delete(listener)
      if (listeners.size > 0) return
      this.#listeners.delete(id)
      void this.#tell(id, 'unwatchJob').catch(() => undefined)
    }
  }

  changed(id: string, status: JobStatus): void {
    for (const listener of this.#listeners.get(id) ?? []) listener(status)
  }
}
