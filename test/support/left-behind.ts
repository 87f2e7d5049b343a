// What a killed daemon may leave in a qcow2 image, judged by `qemu-img check` before anybody repairs it. Accepted, and nothing
// else:
//
//   image without the dirty bit   leaked clusters
//   image with the dirty bit      leaked clusters; refcounts of 0 where there is one reference; and, what follows from these,
//                                 entries of L1 and L2 tables that say "copied"
//
// Two references to one cluster are never accepted: two places of the disk would share it.
//
// In each case `qemu-img check -r all` of a copy must end clean and change nothing that a guest sees. An image that QEMU
// cannot open is one that was being made: it must be gone when the daemon runs again.

import assert from 'node:assert/strict'
import fs from 'node:fs'
import { type ImageCheck, assertClean, checkImage } from './daemon.ts'
import { peer, runPeer } from './peer.ts'

const LEAK = /^Leaked cluster \d+ refcount=\d+ reference=\d+$/
const NOT_COUNTED = /^ERROR cluster \d+ refcount=0 reference=1$/
const COPIED = /^ERROR OFLAG_COPIED (data cluster|L2 cluster): l[12]_(entry|index)=[0-9a-fx]+ .*refcount=0$/
const INCOMPATIBLE_FEATURES_LOW_BYTE = 79
const DIRTY = 1

/** clean: nothing to find; leaks: lost space only; dirty: refcounts to be rebuilt; unmade: no image yet. */
export type Left = 'clean' | 'leaks' | 'dirty' | 'unmade'

/** Fails when the image is in a worse state than a kill may leave. Changes nothing. */
export function judgeLeft(image: string, note: string): Left {
  const check = checkImage(image)
  if (check === undefined) return 'unmade'
  assert.equal(check.checkErrors, 0, `${note}: ${image}: ${check.findings.join('\n')}`)
  if (check.corruptions + check.leaks === 0) return 'clean'
  const isDirty = readDirtyBit(image)
  const bad = check.findings.filter((line) => !isAccepted(line, isDirty))
  assert.deepEqual(bad, [], `${note}: ${image}, ${isDirty ? 'dirty' : 'not dirty'}: more than a kill may leave`)
  assertRepairs(image, note)
  return kindOf(check)
}

function kindOf(check: ImageCheck): Left {
  return check.corruptions > 0 ? 'dirty' : 'leaks'
}

function isAccepted(line: string, isDirty: boolean): boolean {
  return LEAK.test(line) || (isDirty && (NOT_COUNTED.test(line) || COPIED.test(line)))
}

function readDirtyBit(image: string): boolean {
  const fd = fs.openSync(image, 'r')
  const byte = Buffer.alloc(1)
  fs.readSync(fd, byte, 0, 1, INCOMPATIBLE_FEATURES_LOW_BYTE)
  fs.closeSync(fd)
  return ((byte[0] as number) & DIRTY) !== 0
}

/** Beside the image, so that the name of its backing file means the same. */
function assertRepairs(image: string, note: string): void {
  const copy = `${image}.repaired`
  try {
    peer('cp', '--sparse=always', image, copy)
    const { status, stdout, stderr } = runPeer('qemu-img', [
      'check',
      '-q',
      '-T',
      'unsafe',
      '-r',
      'all',
      '-f',
      'qcow2',
      copy,
    ])
    assert.equal(status, 0, `${note}: qemu-img check -r all of ${image}: ${stdout}${stderr}`)
    assertClean(copy, note)
    peer('qemu-img', 'compare', '-q', '-U', '-f', 'qcow2', '-F', 'qcow2', image, copy)
  } finally {
    fs.rmSync(copy, { force: true })
  }
}
