// What Varve repairs in damaged qcow2 images: afterwards `qemu-img check` finds nothing, the disk reads as QEMU read it before, and
// a second repair finds nothing to do. What cannot be repaired is named in LEFT, with what stays.

import assert from 'node:assert/strict'
import fs from 'node:fs'
import path from 'node:path'
import { suite, test } from 'node:test'
import { isBlockError } from '../../src/block/error.ts'
import { openQcow2 } from '../../src/format/qcow2/image.ts'
import { repairQcow2 } from '../../src/format/qcow2/repair.ts'
import { realHost } from '../../src/host/real.ts'
import { missing, peer, runPeer } from '../support/peer.ts'
import { dissect, setBits } from '../support/qcow2-anatomy.ts'
import { type Damage, DAMAGES, IMAGE_NAMES, makeSmallImage, SPECIAL_DAMAGES } from '../support/qcow2-damage.ts'
import { tempFolder } from '../support/temp.ts'

/** What a repair leaves, and why. */
const LEFT: Readonly<Record<string, string>> = {
  'an entry leads to the L1 table': 'nobody knows where the data was; counted right, it does no further harm',
  'an L2 entry leads to no cluster’s start': 'nobody knows where the data is',
  'compressed data lies past the end': 'nobody knows where the data is',
  'subclusters are data and zeros at once': 'nobody knows which of the two is right',
  'subclusters have data and no place': 'nobody knows where the data is',
  'an L2 entry is gone': 'extended L2: its bitmaps say that there was data',
  'a snapshot’s L1 table is at no cluster’s start': 'nobody knows where the snapshot is',
  'a snapshot’s L1 table is too long': 'nobody knows how long it was',
}

/** Images that get every damage; the others their own alone, which is enough to see and saves a minute. */
const IN_FULL = new Set(['version 2', 'extended L2', 'snapshot'])

/** What cannot be opened at all: the snapshot table was at the end of the file. */
const REFUSED = new Set(['snapshot: the file is cut', 'snapshot: the file is cut within a cluster'])

/** The disk as QEMU reads it; undefined when it does not open or read it. */
function content(file: string): Buffer | undefined {
  const raw = `${file}.raw`
  fs.rmSync(raw, { force: true })
  const outcome = runPeer('qemu-img', ['convert', '-f', 'qcow2', '-O', 'raw', file, raw])
  return outcome.status === 0 ? fs.readFileSync(raw) : undefined
}

suite('a repair leaves nothing for qemu-img check to find', { skip: missing('qemu-img', 'qemu-io') }, () => {
  for (const on of IMAGE_NAMES) {
    test(`in a damaged image: ${on}`, async (t) => {
      const folder = tempFolder(t)
      const image = makeSmallImage(folder, on)
      const file = path.join(folder, 'damaged.qcow2')
      const special = Object.entries(SPECIAL_DAMAGES).filter(([, each]) => each.on === on)
      const damages: Record<string, Damage> = Object.fromEntries(special.map(([name, { damage }]) => [name, damage]))
      if (IN_FULL.has(on)) Object.assign(damages, DAMAGES)
      for (const [name, damage] of Object.entries(damages)) {
        await t.test(name, async () => {
          const bytes = Buffer.from(image)
          fs.writeFileSync(file, damage(bytes, dissect(bytes)) ?? bytes)
          if (REFUSED.has(`${on}: ${name}`)) {
            const damaged = fs.readFileSync(file)
            await assert.rejects(repairQcow2(realHost, file, 'all'), (error) => isBlockError(error, 'invalid-format'))
            assert.ok(fs.readFileSync(file).equals(damaged), 'it is left as it was')
            return
          }
          const before = content(file)
          const result = await repairQcow2(realHost, file, 'all')
          const numbers = [result.corruptions, result.leaks, result.checkErrors]
          const qemu = runPeer('qemu-img', ['check', '-f', 'qcow2', file])
          const isLeft = LEFT[name] !== undefined && (on === 'extended L2' || name !== 'an L2 entry is gone')
          if (isLeft) assert.ok(result.corruptions > 0, 'something is left')
          else {
            assert.equal(qemu.status, 0, qemu.stdout + qemu.stderr)
            assert.deepEqual(numbers, [0, 0, 0], result.problems.join('\n'))
          }
          if (before !== undefined) assert.ok(content(file)?.equals(before), 'the disk reads as before')
          const again = await repairQcow2(realHost, file, 'all')
          assert.deepEqual([again.corruptionsFixed, again.leaksFixed], [0, 0], again.found.join('\n'))
        })
      }
    })
  }

  test('leaks alone are repaired, and nothing else is touched', async (t) => {
    const folder = tempFolder(t)
    const image = makeSmallImage(folder, 'plain')
    const file = path.join(folder, 'damaged.qcow2')
    const anatomy = dissect(image)
    DAMAGES['an L2 entry is gone']?.(image, anatomy)
    fs.writeFileSync(file, image)
    const result = await repairQcow2(realHost, file, 'leaks')
    assert.deepEqual([result.leaksFixed, result.corruptionsFixed, result.leaks], [1, 0, 0])
    peer('qemu-img', 'check', '-f', 'qcow2', file)

    DAMAGES['reserved bits are set in an L1 entry']?.(image, anatomy)
    fs.writeFileSync(file, image)
    const both = await repairQcow2(realHost, file, 'leaks')
    assert.deepEqual([both.leaksFixed, both.corruptions], [1, 1])
    image.writeBigUInt64BE(0x8000_0000_0000_0200n, anatomy.l1)
    fs.writeFileSync(file, image)
    const hidden = await repairQcow2(realHost, file, 'leaks')
    assert.equal(hidden.leaksFixed, 0, 'what an unreadable table may use is not given away')
  })

  test('an image in use is not repaired', async (t) => {
    const folder = tempFolder(t)
    const file = path.join(folder, 'used.qcow2')
    fs.writeFileSync(file, makeSmallImage(folder, 'plain'))
    const user = await openQcow2(realHost, file, { name: 'user' })
    await assert.rejects(repairQcow2(realHost, file, 'all'), (error) => isBlockError(error, 'busy'))
    await user.close()
  })

  test('the dirty and the corrupt bit are cleared once nothing is wrong', async (t) => {
    const folder = tempFolder(t)
    const file = path.join(folder, 'marked.qcow2')
    const image = makeSmallImage(folder, 'plain')
    setBits(image, 72, 3n)
    fs.writeFileSync(file, image)
    await repairQcow2(realHost, file, 'all')
    assert.equal(fs.readFileSync(file).readBigUInt64BE(72), 0n)
  })

  test('what keeps an image from being opened is repaired: refcount table and bitmap directory', async (t) => {
    const folder = tempFolder(t)
    const file = path.join(folder, 'closed.qcow2')
    const image = makeSmallImage(folder, 'bitmap')
    for (const damage of HEADER_DAMAGES) {
      const bytes = Buffer.from(image)
      damage(bytes, dissect(image))
      fs.writeFileSync(file, bytes)
      await assert.rejects(openQcow2(realHost, file, { name: 'closed' }), (error) =>
        isBlockError(error, 'invalid-format'),
      )
      const { corruptions, leaks } = await repairQcow2(realHost, file, 'all')
      assert.deepEqual([corruptions, leaks], [0, 0])
      peer('qemu-img', 'check', '-f', 'qcow2', file)
    }
  })

  test('snapshots of version 3 get the extra data that they lack', async (t) => {
    const folder = tempFolder(t)
    const file = path.join(folder, 'old.qcow2')
    const image = makeSmallImage(folder, 'snapshot')
    const [first] = dissect(image).snapshots as [number]
    // The extra data of the first snapshot becomes a part of its name.
    image.writeUInt16BE(image.readUInt16BE(first + 14) + image.readUInt32BE(first + 36), first + 14)
    image.writeUInt32BE(0, first + 36)
    fs.writeFileSync(file, image)
    assert.notEqual(runPeer('qemu-img', ['check', '-f', 'qcow2', file]).status, 0)
    const { corruptions, leaks, corruptionsFixed } = await repairQcow2(realHost, file, 'all')
    assert.deepEqual([corruptions, leaks, corruptionsFixed], [0, 0, 1])
    peer('qemu-img', 'check', '-f', 'qcow2', file)
  })
})

/** Damages after which a header cannot be right. */
const HEADER_DAMAGES: readonly Damage[] = [
  (image) => void image.writeUInt32BE(0, 56),
  (image) => void image.writeBigUInt64BE(1n << 50n, 48),
  (image) => void image.writeBigUInt64BE(0n, 48),
  (image, { l1 }) => void image.writeBigUInt64BE(BigInt(l1), 48),
  (image, { extensions }) =>
    void image.writeBigUInt64BE(1n << 40n, (extensions.find(({ type }) => type === 0x2385_2875)?.at ?? 0) + 24),
]
