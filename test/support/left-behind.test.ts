// The judge of what a kill may leave is itself tested on images that are damaged in known ways.

import assert from 'node:assert/strict'
import fs from 'node:fs'
import path from 'node:path'
import { type TestContext, test } from 'node:test'
import { judgeLeft } from './left-behind.ts'
import { missing, peer } from './peer.ts'
import { tempFolder } from './temp.ts'

const skip = missing('qemu-img', 'qemu-io')
const CLUSTER = 64 * 1024

/** An image whose first MiB holds data, and where its tables are. */
class Victim {
  readonly path: string
  readonly #bytes: Buffer

  constructor(t: TestContext) {
    this.path = path.join(tempFolder(t), 'victim.qcow2')
    peer('qemu-img', 'create', '-q', '-f', 'qcow2', this.path, '16M')
    peer('qemu-io', '-f', 'qcow2', '-c', 'write -q 0 1M', this.path)
    this.#bytes = fs.readFileSync(this.path)
  }

  get l2(): number {
    const l1 = Number(this.#bytes.readBigUInt64BE(40))
    return Number(this.#bytes.readBigUInt64BE(l1) & 0x00ff_ffff_ffff_fe00n)
  }

  l2Entry(index: number): Buffer {
    return this.#bytes.subarray(this.l2 + index * 8, this.l2 + index * 8 + 8)
  }

  /** Where the refcount of a host cluster is. */
  refcountAt(cluster: number): number {
    const table = Number(this.#bytes.readBigUInt64BE(48))
    return Number(this.#bytes.readBigUInt64BE(table)) + cluster * 2
  }

  clusterOf(index: number): number {
    return Number(this.l2Entry(index).readBigUInt64BE() & 0x00ff_ffff_ffff_fe00n) / CLUSTER
  }

  patch(offset: number, bytes: Uint8Array | readonly number[]): void {
    const fd = fs.openSync(this.path, 'r+')
    fs.writeSync(fd, Uint8Array.from(bytes), 0, bytes.length, offset)
    fs.closeSync(fd)
  }

  markDirty(): void {
    this.patch(79, [1])
  }
}

test('a clean image, a leak and a file that is no image are told apart', { skip }, (t) => {
  const victim = new Victim(t)
  assert.equal(judgeLeft(victim.path, 'test'), 'clean')
  victim.patch(victim.l2, new Uint8Array(8))
  assert.equal(judgeLeft(victim.path, 'test'), 'leaks')
  victim.patch(0, [0])
  assert.equal(judgeLeft(victim.path, 'test'), 'unmade')
})

test('a cluster that is not counted is accepted under the dirty bit only', { skip }, (t) => {
  const victim = new Victim(t)
  victim.patch(victim.refcountAt(victim.clusterOf(3)), [0, 0])
  assert.throws(() => judgeLeft(victim.path, 'test'), /not dirty: more than a kill may leave/)
  victim.markDirty()
  assert.equal(judgeLeft(victim.path, 'test'), 'dirty')
})

test('a cluster that two places of the disk share is never accepted', { skip }, (t) => {
  const victim = new Victim(t)
  victim.markDirty()
  victim.patch(victim.l2 + 8, victim.l2Entry(0))
  assert.throws(() => judgeLeft(victim.path, 'test'), /more than a kill may leave/)
})

test('an entry that leads past the end of the file is never accepted', { skip }, (t) => {
  const victim = new Victim(t)
  victim.markDirty()
  victim.patch(victim.l2 + 9, [0xff])
  assert.throws(() => judgeLeft(victim.path, 'test'), /more than a kill may leave/)
})
