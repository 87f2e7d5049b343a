// Memory at page boundaries, which direct I/O asks for and Node's own buffers do not have, in pieces that are lent and given back;
// whoever finds none waits in line. It is mapped by koffi, and then never given back: io_uring may be at work in it when its thread of
// JavaScript dies. Without koffi it is a WebAssembly memory, which begins at a page too. What was never lent takes none.

import { assert } from '../base/assert.ts'
import { DIRECT_PIECE, DIRECT_PIECES } from '../base/limits.ts'
import { koffi, mapMemory } from './koffi.ts'

const WASM_PAGE = 64 * 1024

/** The part of the WebAssembly interface that is used: Node's types leave it to those of browsers. */
interface WithWasm {
  readonly WebAssembly: {
    readonly Memory: new (size: { readonly initial: number }) => { readonly buffer: ArrayBuffer }
  }
}

export class BounceBuffers {
  readonly #free: Uint8Array[]
  readonly #waiting: ((piece: Uint8Array) => void)[] = []

  /** `count` pieces of `length` bytes, a multiple of 64 KiB. */
  constructor(length: number, count: number) {
    assert(length % WASM_PAGE === 0, 'a piece is some pages of WebAssembly long')
    const buffer = koffi === undefined ? wasmMemory(length * count) : mapMemory(koffi, length * count)
    this.#free = Array.from({ length: count }, (_, index) => new Uint8Array(buffer, index * length, length))
  }

  /** Runs `use` with a piece, at once or when one is given back. It has old content. */
  lend(use: (piece: Uint8Array) => void): void {
    // The one given back last is in the processor's cache.
    const piece = this.#free.pop()
    if (piece === undefined) this.#waiting.push(use)
    else use(piece)
  }

  giveBack(piece: Uint8Array): void {
    const next = this.#waiting.shift()
    if (next === undefined) this.#free.push(piece)
    else next(piece)
  }
}

function wasmMemory(length: number): ArrayBuffer {
  const { WebAssembly } = globalThis as unknown as WithWasm
  return new WebAssembly.Memory({ initial: length / WASM_PAGE }).buffer
}

let ofThread: BounceBuffers | undefined

/** Those of this thread, made when they are first needed. */
export function bounceBuffers(): BounceBuffers {
  ofThread ??= new BounceBuffers(DIRECT_PIECE, DIRECT_PIECES)
  return ofThread
}
