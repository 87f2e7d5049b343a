// A line between two daemons: passes connections on, each byte so many milliseconds later, both ways, and can be cut: what is on its way is
// lost, and nobody gets through until it is mended.

import net from 'node:net'

interface Passing {
  readonly here: net.Socket
  readonly there: net.Socket
}

export class SlowLine {
  readonly #to: net.NetConnectOpts
  readonly #delayMs: number
  readonly #server: net.Server
  readonly #passing = new Set<Passing>()
  #isCut = false

  private constructor(to: net.NetConnectOpts, delayMs: number) {
    this.#to = to
    this.#delayMs = delayMs
    this.#server = net.createServer((here) => this.#pass(here))
  }

  /** `delayMs` is that of one way. */
  static async open(to: net.NetConnectOpts, delayMs: number, at: net.ListenOptions): Promise<SlowLine> {
    const line = new SlowLine(to, delayMs)
    await new Promise<void>((resolve) => line.#server.listen(at, resolve))
    return line
  }

  /** Where it listens, when that is TCP. */
  get port(): number {
    return (this.#server.address() as net.AddressInfo).port
  }

  cut(): void {
    this.#isCut = true
    for (const { here, there } of this.#passing) {
      here.destroy()
      there.destroy()
    }
  }

  mend(): void {
    this.#isCut = false
  }

  close(): void {
    this.cut()
    this.#server.close()
  }

  #pass(here: net.Socket): void {
    here.on('error', () => {})
    if (this.#isCut) return void here.destroy()
    const there = net.connect(this.#to)
    const passing = { here, there }
    this.#passing.add(passing)
    for (const [from, to] of [
      [here, there],
      [there, here],
    ] as const) {
      from.setNoDelay(true)
      from.on('error', () => {})
      from.on('data', (data) => setTimeout(() => void (to.destroyed || to.write(data)), this.#delayMs))
      from.on('end', () => setTimeout(() => void to.end(), this.#delayMs))
      from.on('close', () => {
        this.#passing.delete(passing)
        setTimeout(() => void to.destroy(), this.#delayMs)
      })
    }
  }
}
