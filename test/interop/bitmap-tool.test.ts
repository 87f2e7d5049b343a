// `varve image bitmap` and `diff --bitmap` beside `qemu-img bitmap`: the same options on copies of one image leave the same bitmaps,
// and what Varve saves QEMU reads.

import assert from 'node:assert/strict'
import fs from 'node:fs'
import path from 'node:path'
import { suite, test } from 'node:test'
import { openQcow2 } from '../../src/format/qcow2/image.ts'
import { realHost } from '../../src/host/real.ts'
import { qemuIo } from '../support/images.ts'
import { missing, peer } from '../support/peer.ts'
import { beginCommand } from '../support/site.ts'
import { tempFolder } from '../support/temp.ts'

const KIB = 1024
const MIB = 1024 * KIB
const SKIP = { skip: missing('qemu-img', 'qemu-io') }

async function varve(...args: string[]): Promise<string> {
  const { status, stdout, stderr } = await beginCommand(['image', ...args]).ended
  assert.equal(status, 0, stderr)
  return stdout
}

interface Shown {
  readonly name: string
  readonly granularity: number
  readonly isRecording: boolean
  readonly isConsistent: boolean
  readonly ranges: number[][]
}

async function bitmapsOf(image: string): Promise<Shown[]> {
  const opened = await openQcow2(realHost, image, { name: 'image' })
  const shown: Shown[] = []
  for (const { name, granularity, isRecording, isConsistent } of opened.bitmaps) {
    const ranges: number[][] = []
    const bits = await opened.readBitmap(name)
    bits.runs(0, bits.size, bits.size, (...range) => ranges.push(range) > 0)
    shown.push({ name, granularity, isRecording, isConsistent, ranges })
  }
  await opened.close()
  return shown
}

const STEPS: readonly (readonly string[])[] = [
  ['--add', '-g', '32k', '@', 'fine'],
  ['--add', '--disable', '@', 'frozen'],
  ['--add', '@', 'other'],
  ['write -P 3 1M 100k'],
  ['--enable', '@', 'frozen'],
  ['write -P 4 2M 4k'],
  ['--merge', 'other', '@', 'frozen'],
  ['--clear', '@', 'other'],
  ['--disable', '@', 'fine'],
  ['write -P 5 3M 64k'],
  ['--add', '--merge', 'fine', '--merge', 'other', '@', 'sum'],
  ['--merge', 'far', '-b', 'source.qcow2', '-F', 'qcow2', '@', 'sum'],
  ['--remove', '@', 'other'],
]

suite('Bitmaps, beside qemu-img', SKIP, () => {
  test('the same options leave the same bitmaps', async (t) => {
    const folder = tempFolder(t)
    const file = (name: string): string => path.join(folder, name)
    const source = file('source.qcow2')
    peer('qemu-img', 'create', '-q', '-f', 'qcow2', source, '4M')
    peer('qemu-img', 'bitmap', '--add', '-g', '1M', source, 'far')
    qemuIo(source, 'qcow2', 'write -P 9 512k 4k')
    for (const name of ['qemu.qcow2', 'varve.qcow2']) peer('qemu-img', 'create', '-q', '-f', 'qcow2', file(name), '4M')
    for (const step of STEPS) {
      const words = (name: string): string[] =>
        step.map((word) => (word === '@' ? file(name) : word === 'source.qcow2' ? source : word))
      if (step.length === 1) {
        for (const name of ['qemu.qcow2', 'varve.qcow2']) qemuIo(file(name), 'qcow2', step[0] as string)
      } else {
        peer('qemu-img', 'bitmap', ...words('qemu.qcow2'))
        await varve('bitmap', ...words('varve.qcow2'))
      }
      assert.deepEqual(await bitmapsOf(file('varve.qcow2')), await bitmapsOf(file('qemu.qcow2')), step.join(' '))
    }
    peer('qemu-img', 'check', '-q', file('varve.qcow2'))
    const info = (name: string): unknown => {
      const all = JSON.parse(peer('qemu-img', 'info', '--output=json', file(name))) as Record<string, unknown>
      return (all['format-specific'] as { data: { bitmaps: unknown } }).data.bitmaps
    }
    assert.deepEqual(info('varve.qcow2'), info('qemu.qcow2'))
  })

  test('what differs is a bitmap that QEMU reads, and that diff prints again', async (t) => {
    const folder = tempFolder(t)
    const [before, after] = ['before.raw', 'after.qcow2'].map((name) => path.join(folder, name)) as [string, string]
    fs.writeFileSync(before, Buffer.alloc(4 * MIB, 'x'))
    peer('qemu-img', 'convert', '-O', 'qcow2', before, after)
    qemuIo(after, 'qcow2', 'write -P 1 100k 4k', 'write -P 2 1M 300k')
    const ranges = [
      [96 * KIB, 32 * KIB],
      [MIB, 320 * KIB],
    ]
    const options = ['-g', '32k', before, after]
    assert.deepEqual(JSON.parse(await varve('diff', '--output=json', ...options)), ranges.map(asEntry))
    assert.equal(await varve('diff', '--bitmap', 'since', ...options), '')
    const [saved] = await bitmapsOf(after)
    const flags = { isRecording: false, isConsistent: true }
    assert.deepEqual(saved, { name: 'since', granularity: 32 * KIB, ...flags, ranges })
    peer('qemu-img', 'check', '-q', after)
    peer('qemu-img', 'bitmap', '--add', '--disable', '-g', '32k', '--merge', 'since', after, 'by-qemu')
    assert.deepEqual((await bitmapsOf(after))[1]?.ranges, ranges)
    const printed = await varve('diff', '--from-bitmap', 'since', '--output=json', after)
    assert.deepEqual(JSON.parse(printed), ranges.map(asEntry))
    const text = await varve('diff', '--from-bitmap', 'since', after)
    assert.deepEqual(
      text
        .trim()
        .split('\n')
        .map((line) => line.split(/\s+/).map(Number)),
      ranges,
    )
  })
})

const asEntry = ([start, length]: number[]): object => ({ start, length })
