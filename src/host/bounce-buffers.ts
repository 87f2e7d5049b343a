// Memory at page boundaries, which direct I/O asks for and Node's own buffers do not have: pieces of one WebAssembly memory, whose
// beginning is at a page. Pieces are lent and given back; whoever finds none waits in line. Memory that was never lent takes none.

import { assert } from '../base/assert.ts'
import { DIRECT_PIECE, DIRECT_PIECES } from '../base/limits.ts'

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
    const { WebAssembly } = globalThis as unknown as WithWasm
    const { buffer } = new WebAssembly.Memory({ initial: (length / WASM_PAGE) * count })
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

let ofThread: BounceBuffers | undefined

/** Those of this thread, made when they are first needed. */
export function bounceBuffers(): BounceBuffers {
  ofThread ??= new BounceBuffers(DIRECT_PIECE, DIRECT_PIECES)
  return ofThread
}
