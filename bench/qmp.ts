// A client of QEMU's monitor protocol on a Unix socket, as far as a benchmark needs it: commands one at a time, and jobs that are
// waited for by asking. Events are passed over.

import net from 'node:net'
import readline from 'node:readline'

const LOOK_MS = 5

interface Answer {
  readonly return?: unknown
  readonly error?: { readonly class: string; readonly desc: string }
  readonly event?: string
  readonly QMP?: unknown
}

interface QemuJob {
  readonly id: string
  readonly status: string
  readonly error?: string
}

export class Qmp {
  readonly #socket: net.Socket
  readonly #answers: ((answer: Answer) => void)[] = []

  private constructor(socket: net.Socket) {
    this.#socket = socket
    readline.createInterface({ input: socket }).on('line', (line) => {
      const answer = JSON.parse(line) as Answer
      if (answer.event === undefined && answer.QMP === undefined) this.#answers.shift()?.(answer)
    })
  }

  static async connect(path: string): Promise<Qmp> {
    const socket = net.connect({ path })
    await new Promise<void>((resolve, reject) => socket.once('connect', resolve).once('error', reject))
    const qmp = new Qmp(socket)
    await qmp.execute('qmp_capabilities')
    return qmp
  }

  async execute(command: string, given: Readonly<Record<string, unknown>> = {}): Promise<unknown> {
    const answered = new Promise<Answer>((resolve) => this.#answers.push(resolve))
    this.#socket.write(`${JSON.stringify({ execute: command, arguments: given })}\n`)
    const { return: value, error } = await answered
    if (error !== undefined) throw new Error(`${command}: ${error.class}: ${error.desc}`)
    return value
  }

  /** Waits until a job has ended, and completes it when it is ready. It must have been started with `auto-dismiss` off. */
  async jobEnded(id: string): Promise<void> {
    let isCompleted = false
    for (;;) {
      const job = ((await this.execute('query-jobs')) as QemuJob[]).find((one) => one.id === id)
      if (job === undefined) throw new Error(`job ${id} is gone`)
      if (job.status === 'concluded') {
        if (job.error !== undefined) throw new Error(`job ${id}: ${job.error}`)
        await this.execute('job-dismiss', { id })
        return
      }
      if (job.status === 'ready' && !isCompleted) {
        isCompleted = true
        await this.execute('job-complete', { id })
      }
      await new Promise((resolve) => setTimeout(resolve, LOOK_MS))
    }
  }

  close(): void {
    this.#socket.destroy()
  }
}
