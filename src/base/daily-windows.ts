// Times of the day in which something may be done, as people write them: "22:00-06:00", in local time. Windows may overlap, and may pass
// midnight; one that ends when it begins is the whole day. None at all is any time.

/** Minutes since midnight; `to` is outside. */
interface Window {
  readonly from: number
  readonly to: number
}

const DAY_MINUTES = 24 * 60

/** Undefined when the text is no window. */
function parseWindow(text: string): Window | undefined {
  const match = /^(\d{1,2}):(\d{2})-(\d{1,2}):(\d{2})$/.exec(text.trim())
  if (match === null) return undefined
  const [fromHour, fromMinute, toHour, toMinute] = match.slice(1).map(Number) as [number, number, number, number]
  if (fromMinute > 59 || toMinute > 59) return undefined
  const from = fromHour * 60 + fromMinute
  const to = toHour * 60 + toMinute
  if (from >= DAY_MINUTES || to > DAY_MINUTES) return undefined
  return { from, to: to % DAY_MINUTES }
}

export class DailyWindows {
  readonly #windows: readonly Window[]

  private constructor(windows: readonly Window[]) {
    this.#windows = windows
  }

  /** Undefined when one of the texts is no window. */
  static parse(texts: readonly string[]): DailyWindows | undefined {
    const windows = texts.map(parseWindow)
    return windows.some((window) => window === undefined) ? undefined : new DailyWindows(windows as Window[])
  }

  /** Whether a moment, in milliseconds since 1970, is within one of them. */
  isOpen(atMs: number): boolean {
    if (this.#windows.length === 0) return true
    const date = new Date(atMs)
    const minute = date.getHours() * 60 + date.getMinutes()
    return this.#windows.some(({ from, to }) => {
      if (from === to) return true
      return from < to ? minute >= from && minute < to : minute >= from || minute < to
    })
  }

  /** The next moment at which one of them opens, in milliseconds since 1970; undefined when there are none. */
  nextOpening(afterMs: number): number | undefined {
    const date = new Date(afterMs)
    const openings = this.#windows.flatMap(({ from }) =>
      [0, 1].map((day) => new Date(date.getFullYear(), date.getMonth(), date.getDate() + day, 0, from).getTime()),
    )
    const later = openings.filter((moment) => moment > afterMs)
    return later.length === 0 ? undefined : Math.min(...later)
  }
}
