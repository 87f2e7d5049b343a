// The wire of QMP (docs/interop/qmp-spec in QEMU): one JSON object in each line, from the monitor to us. Cuts what comes into lines,
// within a bound, and tells at once what is no QMP: a human monitor begins with a text.
//
//   <- {"QMP": {"version": ..., "capabilities": ["oob"]}}      greeting, once
//   <- {"return": ..., "id": 7}   {"error": {"class": ..., "desc": ...}, "id": 8}   {"event": ..., "data": ..., "timestamp": ...}

import { QMP_REPLY_MAX } from '../../base/qemu-limits.ts'
import { BlockError } from '../../block/error.ts'

const NEWLINE = 0x0a
const SHOWN = 80

export class QmpLines {
  readonly #name: string
  /** The beginning of a line whose end has not come yet. */
  readonly #begun: Buffer[] = []
  #begunBytes = 0

  /** `name` of the monitor is for messages. */
  constructor(name: string) {
    this.#name = name
  }

  /** The objects whose lines end in `data`, in order. Kind 'protocol' for what is none, or too long. */
  *take(data: Buffer): Iterable<Readonly<Record<string, unknown>>> {
    let from = 0
    for (let end = data.indexOf(NEWLINE); end >= 0; end = data.indexOf(NEWLINE, from)) {
      this.#keep(data.subarray(from, end))
      from = end + 1
      const text = Buffer.concat(this.#begun.splice(0)).toString('utf8')
      this.#begunBytes = 0
      if (text.trim() !== '') yield this.#parse(text)
    }
    this.#keep(data.subarray(from))
  }

  #keep(piece: Buffer): void {
    if (piece.length === 0) return
    this.#begun.push(piece)
    this.#begunBytes += piece.length
    if (this.#begunBytes > QMP_REPLY_MAX)
      throw new BlockError('protocol', `${this.#name}: a line of more than ${QMP_REPLY_MAX} bytes`)
    // No newline need follow what a human monitor says first.
    const first = this.#begun[0] as Buffer
    if (!/^\s*(\{|$)/.test(first.subarray(0, SHOWN).toString('latin1'))) throw this.#noQmp(first.toString('latin1'))
  }

  #parse(text: string): Readonly<Record<string, unknown>> {
    try {
      const found: unknown = JSON.parse(text)
      if (typeof found === 'object' && found !== null) return found as Readonly<Record<string, unknown>>
    } catch {
      // Said below.
    }
    throw this.#noQmp(text)
  }

  #noQmp(text: string): BlockError {
    const said = JSON.stringify(text.slice(0, SHOWN).trim())
    const advice = "is it the socket of QEMU's -qmp, and not of -monitor or of the guest agent?"
    return new BlockError('protocol', `${this.#name} does not speak QMP: it said ${said}; ${advice}`)
  }
}
