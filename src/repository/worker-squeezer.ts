// Hashes and compresses in threads of its own, so that the thread that serves guests never does. Threads start with the
// first work and do not keep the process alive while they are idle. What they work on is in memory that is shared, and is not copied.

import os from 'node:os'
import { Worker } from 'node:worker_threads'
import { SQUEEZE_WORKERS_MAX } from '../base/limits.ts'
import { BlockError } from '../block/error.ts'
import type { SqueezeReply, SqueezeRequest } from './squeeze-worker.ts'
import type { Squeezer } from './squeezer.ts'
import { PLAIN_VAULT, type Vault } from './vault.ts'

type Bytes = Uint8Array<ArrayBuffer>
type Numbers = Uint32Array<ArrayBuffer>
type Work =
  | { readonly op: 'hash'; readonly bytes: Uint8Array; readonly pieces: Numbers }
  | { readonly op: 'compress'; readonly bytes: Uint8Array; readonly pieces: Numbers; readonly ids: Bytes }
  | {
      readonly op: 'expand'
      readonly bytes: Uint8Array
      readonly pieces: Numbers
      readonly ids: Bytes
      readonly plainAt: number
    }

interface Asker {
  resolve(result: object): void
  reject(error: BlockError): void
}

/** One thread and what it was asked. */
class Hand {
  readonly #worker: Worker
  readonly #askers = new Map<number, Asker>()
  #jobs = 0
  #lost: BlockError | undefined
  #isClosing = false

  constructor(vault: Vault) {
    const options = { name: 'varve-squeeze', workerData: vault.secret }
    this.#worker = new Worker(new URL('./squeeze-worker.ts', import.meta.url), options)
    this.#worker.unref()
    this.#worker.on('message', (reply: SqueezeReply) => this.#settle(reply))
    this.#worker.on('error', (error) => this.#lose(error))
    this.#worker.on('exit', () => this.#lose(undefined))
  }

  get load(): number {
    return this.#askers.size
  }

  get isLost(): boolean {
    return this.#lost !== undefined
  }

  ask(work: Work): Promise<object> {
    const job = ++this.#jobs
    const request: SqueezeRequest = { ...work, job }
    return new Promise((resolve, reject) => {
      if (this.#lost !== undefined) return reject(this.#lost)
      this.#askers.set(job, { resolve, reject })
      this.#worker.ref()
      const moved: ArrayBuffer[] = [work.pieces.buffer]
      if (work.op !== 'hash') moved.push(work.ids.buffer)
      this.#worker.postMessage(request, moved)
    })
  }

  async close(): Promise<void> {
    this.#isClosing = true
    await this.#worker.terminate()
  }

  #settle(reply: SqueezeReply): void {
    const asker = this.#askers.get(reply.job)
    this.#askers.delete(reply.job)
    // While it is being ended it has to keep a process alive that has nothing else to do.
    if (this.#askers.size === 0 && !this.#isClosing) this.#worker.unref()
    if ('failure' in reply) asker?.reject(new BlockError('io', `hashing failed: ${reply.failure}`))
    else asker?.resolve(reply.result)
  }

  #lose(cause: unknown): void {
    this.#lost ??= new BlockError('io', 'the thread that hashes and compresses has ended', {}, cause)
    for (const asker of this.#askers.values()) asker.reject(this.#lost)
    this.#askers.clear()
  }
}

export class WorkerSqueezer implements Squeezer {
  readonly #hands: (Hand | undefined)[]

  readonly #vault: Vault

  /** `threads` is one less than the processors have, at least one, unless told. */
  constructor(
    vault: Vault = PLAIN_VAULT,
    threads = Math.min(SQUEEZE_WORKERS_MAX, Math.max(1, os.availableParallelism() - 1)),
  ) {
    this.#vault = vault
    this.#hands = Array.from({ length: threads }, () => undefined)
  }

  async hash(bytes: Uint8Array, pieces: Numbers): Promise<Bytes> {
    return (await this.#hand().ask({ op: 'hash', bytes, pieces })) as Bytes
  }

  async compress(bytes: Uint8Array<SharedArrayBuffer>, pieces: Numbers, ids: Bytes): Promise<Numbers> {
    return (await this.#hand().ask({ op: 'compress', bytes, pieces, ids })) as Numbers
  }

  async expand(bytes: Uint8Array<SharedArrayBuffer>, pieces: Numbers, ids: Bytes, plainAt: number): Promise<Bytes> {
    return (await this.#hand().ask({ op: 'expand', bytes, pieces, ids, plainAt })) as Bytes
  }

  async close(): Promise<void> {
    await Promise.all(this.#hands.map((hand) => hand?.close()))
    this.#hands.fill(undefined)
  }

  /** An idle thread, else a new one while there may be more, else the least loaded. */
  #hand(): Hand {
    const alive = this.#hands.filter((hand) => hand !== undefined && !hand.isLost) as Hand[]
    const best = alive.reduce<Hand | undefined>((a, b) => (a === undefined || b.load < a.load ? b : a), undefined)
    const free = this.#hands.findIndex((hand) => hand === undefined || hand.isLost)
    if (best !== undefined && (best.load === 0 || free < 0)) return best
    const fresh = new Hand(this.#vault)
    this.#hands[free] = fresh
    return fresh
  }
}
