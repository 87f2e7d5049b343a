// Hashes and compresses in threads of its own, so that the thread that serves guests never does. Threads start with the
// first work and do not keep the process alive while they are idle. What they work on is in memory that is shared, and is not copied.
// While a guest of this thread asks for anything they leave it a processor. Those of a
// plain repository that is closed wait a while for the next one. What a guest itself waits for has a thread of its own: it stands
// behind no copy there, neither in its queue nor for a processor.

import os from 'node:os'
import { Worker } from 'node:worker_threads'
import { REPOSITORY_SPARE_MS, SQUEEZE_WORKERS_MAX } from '../base/limits.ts'
import { Spares } from '../base/spares.ts'
import { BlockError } from '../block/error.ts'
import { threadGuests } from '../block/thread-guests.ts'
import type { SqueezeReply, SqueezeRequest, SqueezeSetup } from './squeeze-worker.ts'
import type { Squeezer } from './squeezer.ts'
import { PLAIN_VAULT, type Vault } from './vault.ts'

type Bytes = Uint8Array<ArrayBuffer>
type Shared = Uint8Array<SharedArrayBuffer>
type Numbers = Uint32Array<ArrayBuffer>
type Work =
  | { readonly op: 'hash'; readonly bytes: Uint8Array; readonly pieces: Numbers }
  | { readonly op: 'compress'; readonly bytes: Uint8Array; readonly pieces: Numbers; readonly ids: Bytes }
  | {
      readonly op: 'expand'
      readonly bytes: Uint8Array
      readonly pieces: Numbers
      readonly ids: Bytes
      readonly into: Uint8Array
    }

interface Asker {
  resolve(result: object): void
  reject(error: BlockError): void
}

/** One thread and what it was asked. */
class Hand {
  static started = 0
  readonly #worker: Worker
  readonly #askers = new Map<number, Asker>()
  #jobs = 0
  #lost: BlockError | undefined
  #isClosing = false

  constructor(vault: Vault, isUrgent = false) {
    const workerData: SqueezeSetup = { secret: vault.secret, isUrgent }
    const options = { name: 'varve-squeeze', workerData }
    this.#worker = new Worker(new URL('./squeeze-worker.ts', import.meta.url), options)
    Hand.started++
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

/**
 * Idle threads of plain repositories that were closed, for the next one that is opened: a thread takes as long to start as a small backup to hash.
 * What an encrypted repository's threads know ends with it.
 */
const spareHands = new Spares<Hand>(SQUEEZE_WORKERS_MAX, REPOSITORY_SPARE_MS, (hand) => void hand.close())

export class WorkerSqueezer implements Squeezer {
  readonly #hands: (Hand | undefined)[]
  /** For what is urgent. */
  #quick: Hand | undefined
  readonly #vault: Vault
  readonly #guestsAreIdle: () => boolean

  /** `threads` are as many as there are processors unless told, and no more than the limit; all but one are used also when guests are not idle. */
  constructor(
    vault: Vault = PLAIN_VAULT,
    threads = os.availableParallelism(),
    guestsAreIdle = (): boolean => threadGuests.areIdle(performance.now()),
  ) {
    this.#vault = vault
    this.#guestsAreIdle = guestsAreIdle
    this.#hands = Array.from({ length: Math.min(SQUEEZE_WORKERS_MAX, threads) }, () => undefined)
  }

  /** Threads that this thread has started in all. */
  static get started(): number {
    return Hand.started
  }

  /** Threads that were started and have not ended, that for what is urgent aside. */
  get threads(): number {
    return this.#hands.filter((hand) => hand !== undefined && !hand.isLost).length
  }

  /** The thread for what is urgent was started and has not ended. */
  get hasUrgent(): boolean {
    return this.#quick !== undefined && !this.#quick.isLost
  }

  async hash(bytes: Uint8Array, pieces: Numbers): Promise<Bytes> {
    return (await this.#hand().ask({ op: 'hash', bytes, pieces })) as Bytes
  }

  async compress(bytes: Shared, pieces: Numbers, ids: Bytes): Promise<Numbers> {
    return (await this.#hand().ask({ op: 'compress', bytes, pieces, ids })) as Numbers
  }

  async expand(bytes: Shared, pieces: Numbers, ids: Bytes, into: Shared, isUrgent = false): Promise<Bytes> {
    const hand = isUrgent ? this.#quickHand() : this.#hand()
    return (await hand.ask({ op: 'expand', bytes, pieces, ids, into })) as Bytes
  }

  async close(): Promise<void> {
    const hands = this.#hands.splice(0, this.#hands.length, ...this.#hands.map(() => undefined))
    const isIdle = (hand: Hand): boolean => hand.load === 0 && !hand.isLost
    const isKept = (hand: Hand | undefined): boolean =>
      this.#vault.secret === undefined && hand !== undefined && isIdle(hand) && spareHands.keep(hand)
    const ending = [...hands.filter((hand) => !isKept(hand)), this.#quick]
    this.#quick = undefined
    await Promise.all(ending.map((hand) => hand?.close()))
  }

  #quickHand(): Hand {
    if (this.#quick === undefined || this.#quick.isLost) this.#quick = new Hand(this.#vault, true)
    return this.#quick
  }

  /** An idle thread, else a new one while there may be more, else the least loaded. */
  #hand(): Hand {
    const count = this.#guestsAreIdle() ? this.#hands.length : Math.max(1, this.#hands.length - 1)
    const hands = this.#hands.slice(0, count)
    const alive = hands.filter((hand) => hand !== undefined && !hand.isLost) as Hand[]
    const best = alive.reduce<Hand | undefined>((a, b) => (a === undefined || b.load < a.load ? b : a), undefined)
    const free = hands.findIndex((hand) => hand === undefined || hand.isLost)
    if (best !== undefined && (best.load === 0 || free < 0)) return best
    const spare = this.#vault.secret === undefined ? spareHands.take() : undefined
    const next = spare === undefined || spare.isLost ? new Hand(this.#vault) : spare
    this.#hands[free] = next
    return next
  }
}
