// The thread behind WorkerSqueezer: answers each message in turn. It runs at a lower priority than the threads that serve guests, unless a guest
// waits for what it does.

import os from 'node:os'
import { type MessagePort, parentPort, workerData } from 'node:worker_threads'
import { compressPieces, expandPieces, hashPieces } from './squeezer.ts'
import { Vault } from './vault.ts'

/** One request; `job` comes back with the answer. */
export type SqueezeRequest =
  | { readonly op: 'hash'; readonly job: number; readonly bytes: Uint8Array; readonly pieces: Numbers }
  | {
      readonly op: 'compress'
      readonly job: number
      readonly bytes: Uint8Array
      readonly pieces: Numbers
      readonly ids: Bytes
    }
  | {
      readonly op: 'expand'
      readonly job: number
      readonly bytes: Uint8Array
      readonly pieces: Numbers
      readonly ids: Bytes
      readonly into: Uint8Array
    }

type Bytes = Uint8Array<ArrayBuffer>
type Numbers = Uint32Array<ArrayBuffer>

/** What a thread begins with: the repository's secret when there is one, and whether guests wait for it. */
export interface SqueezeSetup {
  readonly secret: Uint8Array | undefined
  readonly isUrgent: boolean
}

/** A failure is a message too: without it the asker would wait for ever. */
export type SqueezeReply =
  | { readonly job: number; readonly result: object }
  | { readonly job: number; readonly failure: string }

const { secret, isUrgent } = workerData as SqueezeSetup
const vault = new Vault(secret)

function answer(request: SqueezeRequest, port: MessagePort): void {
  const { job, bytes, pieces } = request
  switch (request.op) {
    case 'hash': {
      const ids = hashPieces(vault, bytes, pieces)
      return port.postMessage({ job, result: ids } satisfies SqueezeReply, [ids.buffer])
    }
    case 'compress': {
      const records = compressPieces(vault, bytes, pieces, request.ids)
      return port.postMessage({ job, result: records } satisfies SqueezeReply, [records.buffer])
    }
    case 'expand': {
      const outcome = expandPieces(vault, bytes, pieces, request.ids, request.into)
      return port.postMessage({ job, result: outcome } satisfies SqueezeReply, [outcome.buffer])
    }
  }
}

// Of this thread alone: for Linux a thread has a priority of its own, and 0 is the one that asks.
if (!isUrgent) os.setPriority(0, os.constants.priority.PRIORITY_BELOW_NORMAL)

parentPort?.on('message', (request: SqueezeRequest) => {
  const port = parentPort as MessagePort
  try {
    answer(request, port)
  } catch (error) {
    port.postMessage({ job: request.job, failure: String(error) } satisfies SqueezeReply)
  }
})
