// Answers one block status request: asks every context that the client selected, and joins and bounds what they say. Does
// not encode; the transmission does.

import { NBD_STATUS_EXTENTS } from '../base/limits.ts'
import { andThen, type Pending } from '../block/device.ts'
import { ExtentJoiner } from '../block/extents.ts'
import type { SelectedContext } from './export.ts'

/** One context's answer: pairs of length in bytes and status, at least one, together at most the range asked for. */
export interface StatusAnswer {
  readonly id: number
  readonly extents: number[]
}

/** Fills `answers`, one per context; with `onlyOne` each has a single extent (NBD_CMD_FLAG_REQ_ONE). */
export function blockStatus(
  contexts: readonly SelectedContext[],
  offset: number,
  length: number,
  onlyOne: boolean,
  answers: StatusAnswer[],
): Pending {
  const limit = onlyOne ? 1 : NBD_STATUS_EXTENTS
  let pending: Pending
  for (const selected of contexts) {
    const answer: StatusAnswer = { id: selected.id, extents: [] }
    answers.push(answer)
    pending = andThen(pending, () => ask(selected, offset, length, limit, answer.extents))
  }
  return pending
}

function ask(selected: SelectedContext, offset: number, length: number, limit: number, extents: number[]): Pending {
  const joiner = new ExtentJoiner((piece, status) => {
    extents.push(piece, status)
    return extents.length < limit * 2
  })
  const pending = selected.context.extents(offset, length, (piece, status) => joiner.add(piece, status))
  return andThen(pending, () => {
    joiner.end()
    return undefined
  })
}
