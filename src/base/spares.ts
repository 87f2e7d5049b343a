// Things that take long to make, or memory that is new to the process each time, kept for a while for whoever needs the next one: work that
// comes again and again then makes them once. When nothing was kept for a while all are dropped. Knows nothing of what they are.

export class Spares<T> {
  readonly #most: number
  readonly #forMs: number
  readonly #drop: (spare: T) => void
  readonly #spares: T[] = []
  #timer: NodeJS.Timeout | undefined

  /** Keeps at most so many, for so many milliseconds after the last one came; `drop` hears of each that nobody took. */
  constructor(most: number, forMs: number, drop: (spare: T) => void = () => undefined) {
    this.#most = most
    this.#forMs = forMs
    this.#drop = drop
  }

  /** The one that was kept last. */
  take(): T | undefined {
    return this.#spares.pop()
  }

  /** False when there are enough: it is still the caller's. */
  keep(spare: T): boolean {
    if (this.#spares.length >= this.#most) return false
    this.#spares.push(spare)
    if (this.#timer === undefined) this.#timer = setTimeout(this.#dropAll, this.#forMs).unref()
    else this.#timer.refresh()
    return true
  }

  readonly #dropAll = (): void => {
    this.#timer = undefined
    for (const spare of this.#spares.splice(0)) this.#drop(spare)
  }
}
