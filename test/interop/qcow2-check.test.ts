// What Varve's check finds in damaged qcow2 images is what `qemu-img check` finds, number for number; where the two differ, the
// table DIFFERENT says why.

import assert from 'node:assert/strict'
import fs from 'node:fs'
import path from 'node:path'
import { suite, test, type TestContext } from 'node:test'
import { isBlockError } from '../../src/block/error.ts'
import type { CheckResult } from '../../src/format/qcow2/check.ts'
import { openQcow2 } from '../../src/format/qcow2/image.ts'
import { realHost } from '../../src/host/real.ts'
import { missing, runPeer } from '../support/peer.ts'
import { dissect } from '../support/qcow2-anatomy.ts'
import { type Damage, DAMAGES, IMAGE_NAMES, makeSmallImage, SPECIAL_DAMAGES } from '../support/qcow2-damage.ts'
import { tempFolder } from '../support/temp.ts'

type Numbers = Readonly<Record<string, number>>

const FIELDS: Readonly<Record<string, keyof CheckResult>> = {
  corruptions: 'corruptions',
  leaks: 'leaks',
  'check-errors': 'checkErrors',
  'image-end-offset': 'imageEndOffset',
  'total-clusters': 'totalClusters',
  'allocated-clusters': 'allocatedClusters',
  'fragmented-clusters': 'fragmentedClusters',
  'compressed-clusters': 'compressedClusters',
}

async function varveFinds(file: string): Promise<Numbers | string> {
  try {
    const image = await openQcow2(realHost, file, { name: path.basename(file) })
    try {
      const result = await image.check()
      return Object.fromEntries(Object.entries(FIELDS).map(([name, field]) => [name, result[field] as number]))
    } finally {
      await image.close()
    }
  } catch (error) {
    if (isBlockError(error)) return error.message
    throw error
  }
}

function qemuFinds(file: string): Numbers | string {
  const outcome = runPeer('qemu-img', ['check', '-f', 'qcow2', '--output=json', file])
  if (!outcome.stdout.startsWith('{')) return outcome.stderr.trim()
  const found = JSON.parse(outcome.stdout) as Record<string, number>
  return Object.fromEntries(Object.keys(FIELDS).map((name) => [name, found[name] ?? 0]))
}

/** Where the two differ, and why. */
const DIFFERENT: Readonly<Record<string, string>> = {
  'snapshot: the file is cut': 'Varve does not open an image whose snapshot table is gone; a repair does',
  'snapshot: the file is cut within a cluster':
    'Varve does not open an image whose snapshot table is gone; a repair does',
  'bitmap: a bitmap table entry has reserved bits': 'QEMU does not open the image; Varve reads the disk all the same',
  'bitmap: a bitmap table entry leads to no cluster’s start':
    'QEMU does not open the image; Varve reads the disk all the same',
}

interface Trial {
  readonly folder: string
  readonly image: Buffer
  /** What the damage is done to, and the damage. */
  readonly name: string
  readonly damage: Damage
}

async function compare(t: TestContext, { folder, image, name, damage }: Trial): Promise<void> {
  const bytes = Buffer.from(image)
  const file = path.join(folder, 'damaged.qcow2')
  fs.writeFileSync(file, damage(bytes, dissect(bytes)) ?? bytes)
  const varve = await varveFinds(file)
  const qemu = qemuFinds(file)
  if (DIFFERENT[name] !== undefined) {
    assert.notDeepEqual(varve, qemu, 'no longer different')
    t.diagnostic(`${JSON.stringify(varve)}, QEMU ${JSON.stringify(qemu)}: ${DIFFERENT[name]}`)
  } else if (typeof varve !== 'string' || typeof qemu !== 'string') assert.deepEqual(varve, qemu)
}

suite('a check finds what qemu-img check finds', { skip: missing('qemu-img', 'qemu-io') }, () => {
  for (const on of IMAGE_NAMES) {
    test(`in a damaged image: ${on}`, async (t) => {
      const folder = tempFolder(t)
      const image = makeSmallImage(folder, on)
      const special = Object.entries(SPECIAL_DAMAGES).filter(([, each]) => each.on === on)
      const damages = { ...DAMAGES, ...Object.fromEntries(special.map(([name, { damage }]) => [name, damage])) }
      for (const [name, damage] of Object.entries(damages)) {
        if (on === 'compressed' && DAMAGES[name] !== undefined) continue
        await t.test(name, (each) => compare(each, { folder, image, name: `${on}: ${name}`, damage }))
      }
    })
  }
})
