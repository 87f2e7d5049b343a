// A line from one lab to another, in memory: what its peers are. It can be cut, also between a question and its answer, and led to another
// lab: what a crash left of the first.

import type { BlockDevice, ExtentVisitor, Pending } from '../../src/block/device.ts'
import { BlockError } from '../../src/block/error.ts'
import { Filter } from '../../src/block/filter.ts'
import type { IncomingReply, IncomingRequest, IncomingStep, PeerLink, Peers } from '../../src/engine/peers.ts'
import type { Lab } from './lab.ts'

export class LabWire implements Peers {
  #to: Lab | undefined

  constructor(to: Lab) {
    this.#to = to
  }

  cut(): void {
    this.#to = undefined
  }

  lead(to: Lab): void {
    this.#to = to
  }

  prepare(_to: string, request: IncomingRequest): Promise<IncomingReply> {
    return this.#ask((lab) => lab.engine.prepareIncoming(request))
  }

  step(_to: string, token: string, step: IncomingStep): Promise<IncomingReply> {
    return this.#ask((lab) => lab.engine.stepIncoming(token, step))
  }

  async connect(_to: string, token: string): Promise<PeerLink> {
    const lab = this.#here()
    const lost = (): BlockError | undefined => (this.#to === lab ? undefined : isCut())
    return { device: new WireDevice(lab.disk(token), lost), lost, abandon: () => {} }
  }

  async #ask(question: (lab: Lab) => Promise<IncomingReply>): Promise<IncomingReply> {
    const lab = this.#here()
    const answer = await question(lab)
    if (this.#to !== lab) throw isCut()
    return answer
  }

  #here(): Lab {
    if (this.#to === undefined) throw isCut()
    return this.#to
  }
}

function isCut(): BlockError {
  return new BlockError('io', 'the line is cut')
}

/** Answers nothing that comes after the cut. */
class WireDevice extends Filter {
  readonly #lost: () => BlockError | undefined

  constructor(inner: BlockDevice, lost: () => BlockError | undefined) {
    super(inner)
    this.#lost = lost
  }

  override read(offset: number, length: number, into: Uint8Array, at: number): Pending {
    return this.#pass(() => this.inner.read(offset, length, into, at))
  }

  override write(offset: number, length: number, from: Uint8Array, at: number, flags: number): Pending {
    return this.#pass(() => this.inner.write(offset, length, from, at, flags))
  }

  override zero(offset: number, length: number, flags: number): Pending {
    return this.#pass(() => this.inner.zero(offset, length, flags))
  }

  override trim(offset: number, length: number, flags: number): Pending {
    return this.#pass(() => this.inner.trim(offset, length, flags))
  }

  override flush(): Pending {
    return this.#pass(() => this.inner.flush())
  }

  override extents(offset: number, length: number, visit: ExtentVisitor): Pending {
    return this.#pass(() => this.inner.extents(offset, length, visit))
  }

  /** The disk is its lab's. */
  override async close(): Promise<void> {}

  async #pass(ask: () => Pending): Promise<void> {
    const before = this.#lost()
    if (before !== undefined) throw before
    await ask()
    const after = this.#lost()
    if (after !== undefined) throw after
  }
}
