// The appends of a dirty log that did not complete within their call: those who must know that what was logged before is written wait
// for them here. What a failure of one means is the caller's.

import { settled } from './outcome.ts'

export class Appends {
  #answered: Promise<void> | undefined
  #over: Promise<void> | undefined

  /** Answered, with whatever a failure was answered with; undefined when none is under way. */
  get answered(): Promise<void> | undefined {
    return this.#answered
  }

  /** No longer on their way to the file, written or failed; undefined when none is under way. */
  get over(): Promise<void> | undefined {
    return this.#over
  }

  /** One more is under way; `failed` is what its failure is answered with. Returns its answer. */
  add(written: Promise<void>, failed: (error: unknown) => Promise<void>): Promise<void> {
    const answer = written.catch(failed)
    const answered = both(this.#answered, answer)
    this.#answered = answered
    const over = both(this.#over, settled(written))
    this.#over = over
    const forget = (): void => {
      if (this.#answered === answered) this.#answered = undefined
      if (this.#over === over) this.#over = undefined
    }
    answered.then(forget, forget)
    return answer
  }
}

function both(before: Promise<void> | undefined, last: Promise<void>): Promise<void> {
  return before === undefined ? last : Promise.all([before, last]).then(() => undefined)
}
