// Makes requests fail by rule, for tests of what comes above: the n-th write, every read of a bad block, a full disk.

import type { BlockDevice } from '../block/device.ts'
import { BlockError, type ErrorKind } from '../block/error.ts'
import { InterceptFilter, type Request } from './intercept.ts'

export interface FaultRule {
  /** Which requests it counts; all kinds unless told. */
  readonly kinds?: readonly Request['kind'][]
  /** Only those that touch this range of bytes. */
  readonly offset?: number
  readonly length?: number
  /** The first of them that fails, counted from 1; 1 unless told. */
  readonly from?: number
  /** How many fail; all from there on unless told. */
  readonly times?: number
  /** The kind of error; 'io' unless told. */
  readonly error?: ErrorKind
}

export class FaultFilter extends InterceptFilter {
  readonly #rules: { readonly rule: FaultRule; seen: number }[] = []
  #requests = 0

  constructor(inner: BlockDevice, ...rules: readonly FaultRule[]) {
    super(inner, (request) => this.#judge(request))
    for (const rule of rules) this.add(rule)
  }

  /** How many requests came by. */
  get requests(): number {
    return this.#requests
  }

  add(rule: FaultRule): void {
    this.#rules.push({ rule, seen: 0 })
  }

  /** Forgets all rules: the device works again. */
  heal(): void {
    this.#rules.length = 0
  }

  #judge(request: Request): undefined {
    this.#requests++
    for (const state of this.#rules) {
      if (!isMeant(state.rule, request)) continue
      state.seen++
      const { from = 1, times = Number.POSITIVE_INFINITY, error = 'io' } = state.rule
      if (state.seen < from || state.seen >= from + times) continue
      const { kind, offset, length } = request
      throw new BlockError(error, `${this.name}: injected failure of ${kind}`, { device: this.name, offset, length })
    }
    return undefined
  }
}

function isMeant(rule: FaultRule, request: Request): boolean {
  if (rule.kinds !== undefined && !rule.kinds.includes(request.kind)) return false
  const { offset = 0, length = Number.POSITIVE_INFINITY } = rule
  return rule.offset === undefined || (request.offset < offset + length && offset < request.offset + request.length)
}
