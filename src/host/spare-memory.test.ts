import assert from 'node:assert/strict'
import { test } from 'node:test'
import { syscalls } from './syscalls.ts'

/** Buffers of 1 MiB, of which every other one is let go again. */
async function afterLettingGo(): Promise<void> {
  let all: (Uint8Array | undefined)[] = Array.from({ length: 64 }, () => Buffer.allocUnsafeSlow(1024 * 1024).fill(1))
  all = all.map((buffer, index) => (index % 2 === 0 ? undefined : buffer))
  await syscalls?.trimMemory()
  for (const buffer of all) assert.ok(buffer === undefined || buffer.every((byte) => byte === 1))
}

test(
  'giving memory back takes none that is in use',
  { skip: syscalls === undefined && 'needs system calls' },
  afterLettingGo,
)
