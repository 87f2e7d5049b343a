// A QEMU guest agent as it looks on its socket (qemu-ga-ref): answers lines of JSON, resynchronizes on 0xff, and counts as its guest's file
// systems being frozen. What it does at each command can be changed.

import net from 'node:net'

/** What it does when it is asked for a command: answers, fails, says nothing, or hangs up. */
export type Manner = 'answer' | 'fail' | 'silent' | 'hang up'

export class FakeAgent {
  readonly socket: string
  /** Commands in their order, synchronizations apart. */
  readonly asked: string[] = []
  isFrozen = false
  /** By command; 'answer' for the others. */
  readonly manners: Record<string, Manner | undefined> = {}
  /** What is on the line when a client comes: left by an earlier one. */
  stale = ''
  readonly #server: net.Server
  readonly #clients = new Set<net.Socket>()
  #watchers: (() => void)[] = []

  private constructor(socket: string) {
    this.socket = socket
    this.#server = net.createServer((client) => this.#serve(client))
  }

  static async listen(socket: string): Promise<FakeAgent> {
    const agent = new FakeAgent(socket)
    await new Promise<void>((resolve) => agent.#server.listen(socket, resolve))
    return agent
  }

  /** Resolves when so many commands were asked for. */
  async heard(count: number): Promise<void> {
    while (this.asked.length < count) await new Promise<void>((resolve) => this.#watchers.push(resolve))
  }

  async close(): Promise<void> {
    for (const client of this.#clients) client.destroy()
    await new Promise((resolve) => this.#server.close(resolve))
  }

  #serve(client: net.Socket): void {
    this.#clients.add(client)
    client.on('close', () => this.#clients.delete(client))
    client.on('error', () => {})
    client.write(this.stale)
    let text = ''
    client.on('data', (data) => {
      const at = data.lastIndexOf(0xff)
      text = at >= 0 ? data.subarray(at + 1).toString() : text + data.toString()
      const lines = text.split('\n')
      text = lines.pop() ?? ''
      for (const line of lines) this.#answer(client, JSON.parse(line) as Request)
    })
  }

  #answer(client: net.Socket, { execute, arguments: args }: Request): void {
    if (execute === 'guest-sync-delimited') {
      client.write(Buffer.concat([Buffer.of(0xff), Buffer.from(`${JSON.stringify({ return: args?.id })}\n`)]))
      return
    }
    this.asked.push(execute)
    const manner = this.manners[execute] ?? 'answer'
    if (manner === 'answer' && execute !== 'guest-fsfreeze-status') this.isFrozen = execute.endsWith('-freeze')
    if (manner === 'answer') client.write(`${JSON.stringify({ return: 2 })}\n`)
    if (manner === 'fail') client.write('{"error":{"class":"GenericError","desc":"no such file system"}}\n')
    if (manner === 'hang up') client.destroy()
    for (const tell of this.#watchers.splice(0)) tell()
  }
}

interface Request {
  readonly execute: string
  readonly arguments?: { readonly id?: number }
}
