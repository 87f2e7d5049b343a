// QEMU's monitor as it looks on its socket (docs/interop/qmp-spec in QEMU), with answers that a test gives. One client at a time, as there.

import net from 'node:net'

export const GREETING =
  '{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""}, "capabilities": ["oob"]}}\r\n'

export interface Command {
  readonly execute: string
  readonly arguments?: Readonly<Record<string, unknown>>
  readonly id: number
  readonly isOob: boolean
}

/** What the monitor does with a command: the value that it returns; or it writes, or does not, by itself. */
export type Answer = (command: Command, client: net.Socket) => unknown

/** Returned by an answer that has written for itself, or never will. */
export const SILENT = Symbol('silent')

export class FakeMonitor {
  readonly socket: string
  readonly asked: Command[] = []
  greeting = GREETING
  readonly #server: net.Server
  readonly #clients = new Set<net.Socket>()
  readonly #answer: Answer

  private constructor(socket: string, answer: Answer) {
    this.socket = socket
    this.#answer = answer
    this.#server = net.createServer((client) => this.#serve(client))
  }

  static async listen(socket: string, answer: Answer): Promise<FakeMonitor> {
    const monitor = new FakeMonitor(socket, answer)
    await new Promise<void>((resolve) => monitor.#server.listen(socket, resolve))
    return monitor
  }

  /** To whoever is connected. */
  say(text: string): void {
    for (const client of this.#clients) client.write(text)
  }

  hangUp(): void {
    for (const client of this.#clients) client.destroy()
  }

  async close(): Promise<void> {
    this.hangUp()
    await new Promise((resolve) => this.#server.close(resolve))
  }

  #serve(client: net.Socket): void {
    this.#clients.add(client)
    client.on('close', () => this.#clients.delete(client))
    client.on('error', () => {})
    client.write(this.greeting)
    let text = ''
    client.on('data', (data) => {
      const lines = (text + data.toString()).split('\n')
      text = lines.pop() ?? ''
      for (const line of lines) this.#take(client, JSON.parse(line) as Request)
    })
  }

  #take(client: net.Socket, request: Request): void {
    const { 'exec-oob': oob, id } = request
    const execute = oob ?? request.execute
    const command = { ...request, execute, isOob: oob !== undefined }
    this.asked.push(command)
    const value = execute === 'qmp_capabilities' ? {} : this.#answer(command, client)
    if (value !== SILENT) client.write(`${JSON.stringify({ return: value, id })}\r\n`)
  }
}

interface Request extends Command {
  readonly 'exec-oob'?: string
}
