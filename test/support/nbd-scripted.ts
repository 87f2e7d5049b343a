// An NBD server that says what a test tells it to, message by message, and remembers what the client said. It knows the form of
// the messages and believes nothing of their meaning.

import net from 'node:net'
import path from 'node:path'
import type { TestContext } from 'node:test'
import { formatNbdUri } from '../../src/nbd/uri.ts'
import { ACK, u16, u32, u64 } from './nbd-wire.ts'
import { tempFolder } from './temp.ts'

export interface SaidOption {
  readonly option: number
  readonly data: Buffer
}

export interface SaidRequest {
  readonly flags: number
  readonly type: number
  readonly cookie: Buffer
  readonly offset: number
  readonly length: number
  readonly data: Buffer
}

/** Bytes to say; 'hang-up' ends the connection. */
export type Answer = Buffer | 'hang-up'

export interface Script {
  /** Handshake flags, 3 unless told. */
  readonly flags?: number
  /** Answers to options, by number; those of a server with structured replies and base:allocation unless told. */
  readonly options?: Readonly<Record<number, (data: Buffer) => Answer>>
  readonly request?: (request: SaidRequest, connection: number) => Answer
}

export interface Scripted {
  readonly uri: string
  readonly clientFlags: number[]
  readonly options: SaidOption[]
  readonly requests: SaidRequest[]
  /** Connections that ended, from the client's side. */
  readonly ended: number
}

export function saysOption(option: number, type: number, data: Buffer = Buffer.alloc(0)): Buffer {
  return Buffer.concat([Buffer.from('0003e889045565a9', 'hex'), u32(option), u32(type), u32(data.length), data])
}

/** NBD_INFO_EXPORT of 64 KiB, with flush, FUA, trim and write zeroes unless told. */
export function saysSize(flags = 0b110_1101, size = 65_536): Buffer {
  return saysOption(7, 3, Buffer.concat([u16(0), u64(size), u16(flags)]))
}

export function saysSimple({ cookie }: SaidRequest, errno = 0, data: Buffer = Buffer.alloc(0)): Buffer {
  return Buffer.concat([u32(0x6744_6698), u32(errno), cookie, data])
}

export function saysChunk(
  { cookie }: SaidRequest,
  flags: number,
  type: number,
  payload: Buffer = Buffer.alloc(0),
): Buffer {
  return Buffer.concat([u32(0x668e_33ef), u16(flags), u16(type), cookie, u32(payload.length), payload])
}

/** A read that succeeds, full of the byte 7. */
export function saysData(request: SaidRequest): Buffer {
  return saysChunk(request, 1, 1, Buffer.concat([u64(request.offset), Buffer.alloc(request.length, 7)]))
}

const OPTIONS: NonNullable<Script['options']> = {
  2: () => saysOption(2, ACK),
  7: () => Buffer.concat([saysSize(), saysOption(7, ACK)]),
  8: () => saysOption(8, ACK),
  10: () =>
    Buffer.concat([saysOption(10, 4, Buffer.concat([u32(3), Buffer.from('base:allocation')])), saysOption(10, ACK)]),
}

/** Serves on a Unix socket until the test is over. */
export async function scripted(t: TestContext, script: Script = {}): Promise<Scripted> {
  const socket = path.join(tempFolder(t), 'nbd.sock')
  const uri = formatNbdUri({ transport: 'unix', path: socket, name: '' })
  const said = {
    uri,
    clientFlags: [] as number[],
    options: [] as SaidOption[],
    requests: [] as SaidRequest[],
    ended: 0,
  }
  let connections = 0
  const server = net.createServer({ allowHalfOpen: true }, (client) => {
    const number = connections++
    let received = Buffer.alloc(0)
    let state: 'flags' | 'options' | 'requests' = 'flags'
    const answer = (what: Answer): void => void (what === 'hang-up' ? client.end() : client.write(what))
    const step = (): number => {
      if (state === 'flags') {
        if (received.length < 4) return 0
        said.clientFlags.push(received.readUInt32BE(0))
        state = 'options'
        return 4
      }
      if (state === 'options') {
        const length = received.length < 16 ? 0 : 16 + received.readUInt32BE(12)
        if (length === 0 || received.length < length) return 0
        const option = received.readUInt32BE(8)
        const data = Buffer.from(received.subarray(16, length))
        said.options.push({ option, data })
        if (option === 1 || option === 7) state = 'requests'
        answer((script.options?.[option] ?? OPTIONS[option] ?? (() => saysOption(option, 0x8000_0001)))(data))
        if (option === 7 && saysNo(script.options?.[7]?.(data))) state = 'options'
        return length
      }
      if (received.length < 28) return 0
      const type = received.readUInt16BE(6)
      const length = 28 + (type === 1 ? received.readUInt32BE(24) : 0)
      if (received.length < length) return 0
      const request = {
        flags: received.readUInt16BE(4),
        type,
        cookie: Buffer.from(received.subarray(8, 16)),
        offset: Number(received.readBigUInt64BE(16)),
        length: received.readUInt32BE(24),
        data: Buffer.from(received.subarray(28, length)),
      }
      said.requests.push(request)
      if (type === 2) return length
      if (script.request !== undefined) answer(script.request(request, number))
      else answer(type === 0 ? saysData(request) : saysSimple(request))
      return length
    }
    client.on('error', () => {})
    client.on('data', (bytes: Buffer) => {
      received = Buffer.concat([received, bytes])
      for (let used = step(); used > 0; used = step()) received = received.subarray(used)
    })
    client.on('end', () => {
      said.ended++
      client.end()
    })
    client.write(Buffer.concat([Buffer.from('NBDMAGICIHAVEOPT'), u16(script.flags ?? 3)]))
  })
  await new Promise<void>((resolve) => server.listen(socket, resolve))
  t.after(() => server.close())
  return said
}

/** True when an answer to GO ends with an error. */
function saysNo(answer: Answer | undefined): boolean {
  return Buffer.isBuffer(answer) && answer.indexOf(saysOption(7, ACK)) === -1
}
