// NBD messages as bytes, and their reading, for tests that speak the protocol by hand. Written from the specification and
// on purpose not with the code under test.

import assert from 'node:assert/strict'
import type { RawPeer } from './nbd.ts'

export const GO = 7
export const ACK = 1
export const ERROR = 2 ** 31

export function u16(value: number): Buffer {
  const bytes = Buffer.alloc(2)
  bytes.writeUInt16BE(value)
  return bytes
}

export function u32(value: number): Buffer {
  const bytes = Buffer.alloc(4)
  bytes.writeUInt32BE(value >>> 0)
  return bytes
}

export function u64(value: number | bigint): Buffer {
  const bytes = Buffer.alloc(8)
  bytes.writeBigUInt64BE(BigInt(value))
  return bytes
}

/** A string with its length before it. */
export function str(text: string): Buffer {
  return Buffer.concat([u32(Buffer.byteLength(text)), Buffer.from(text)])
}

export function optionMessage(option: number, ...data: Buffer[]): Buffer {
  const payload = Buffer.concat(data)
  return Buffer.concat([Buffer.from('IHAVEOPT'), u32(option), u32(payload.length), payload])
}

export function goMessage(name: string, option = GO, infos: number[] = []): Buffer {
  return optionMessage(option, str(name), u16(infos.length), ...infos.map(u16))
}

export function metaMessage(option: number, name: string, ...queries: string[]): Buffer {
  return optionMessage(option, str(name), u32(queries.length), ...queries.map(str))
}

export interface RequestParts {
  readonly type: number
  readonly flags?: number
  readonly cookie?: number | bigint
  readonly offset?: number | bigint
  readonly length?: number
  readonly data?: Uint8Array
}

export function requestMessage(parts: RequestParts): Buffer {
  const { type, flags = 0, cookie = 1, offset = 0, data = Buffer.alloc(0) } = parts
  const fields = [u16(flags), u16(type), u64(cookie), u64(offset), u32(parts.length ?? data.length)]
  return Buffer.concat([u32(0x2560_9513), ...fields, data])
}

/** Reads the greeting and answers with client flags. */
export async function greet(peer: RawPeer, clientFlags = 3): Promise<Buffer> {
  const greeting = await peer.receive(18)
  peer.send(u32(clientFlags))
  return greeting
}

export interface OptionReply {
  readonly option: number
  readonly type: number
  readonly data: Buffer
}

export async function optionReply(peer: RawPeer): Promise<OptionReply> {
  const header = await peer.receive(20)
  assert.equal(header.subarray(0, 8).toString('hex'), '0003e889045565a9')
  return {
    option: header.readUInt32BE(8),
    type: header.readUInt32BE(12),
    data: await peer.receive(header.readUInt32BE(16)),
  }
}

/** Sends an option and reads replies up to ACK or an error. */
export async function ask(peer: RawPeer, message: Buffer): Promise<OptionReply[]> {
  peer.send(message)
  const replies: OptionReply[] = []
  for (;;) {
    const reply = await optionReply(peer)
    assert.equal(reply.option, message.readUInt32BE(8))
    replies.push(reply)
    if (reply.type === ACK || reply.type >= ERROR) return replies
  }
}

/** Enters transmission on the default export; with `structured` replies, and contexts, if asked for. */
export async function enter(peer: RawPeer, structured = false, contexts: string[] = []): Promise<void> {
  await greet(peer)
  if (structured) await ask(peer, optionMessage(8))
  if (contexts.length > 0) await ask(peer, metaMessage(10, '', ...contexts))
  assert.equal((await ask(peer, goMessage(''))).at(-1)?.type, ACK)
}

/** Reads a simple reply to the cookie and returns its error number. */
export async function simpleReply(peer: RawPeer, cookie: number | bigint = 1): Promise<number> {
  const reply = await peer.receive(16)
  assert.equal(reply.readUInt32BE(0), 0x6744_6698)
  assert.equal(reply.readBigUInt64BE(8), BigInt(cookie))
  return reply.readUInt32BE(4)
}

export interface Chunk {
  readonly flags: number
  readonly type: number
  readonly cookie: bigint
  readonly data: Buffer
}

export async function chunk(peer: RawPeer): Promise<Chunk> {
  const header = await peer.receive(20)
  assert.equal(header.readUInt32BE(0), 0x668e_33ef)
  const data = await peer.receive(header.readUInt32BE(16))
  return { flags: header.readUInt16BE(4), type: header.readUInt16BE(6), cookie: header.readBigUInt64BE(8), data }
}
