// Internal snapshots between QEMU and Varve: either makes, applies and deletes them in turns on one image, and after each turn
// `qemu-img check` finds it clean, and the disk and every snapshot read the same in both.

import assert from 'node:assert/strict'
import fs from 'node:fs'
import path from 'node:path'
import { suite, test } from 'node:test'
import { Random, seedOfRun } from '../../src/base/random.ts'
import { roundDown } from '../../src/base/round.ts'
import type { BlockDevice, Layer } from '../../src/block/device.ts'
import { isBlockError } from '../../src/block/error.ts'
import { openQcow2, type Qcow2Image } from '../../src/format/qcow2/image.ts'
import { openRaw } from '../../src/format/raw/raw.ts'
import { realHost } from '../../src/host/real.ts'
import { missing, peer, runPeer } from '../support/peer.ts'
import { tempFolder } from '../support/temp.ts'

const KIB = 1024
const MIB = 1024 * KIB

async function contentOf(device: BlockDevice): Promise<Buffer> {
  const bytes = Buffer.alloc(device.size)
  await device.read(0, bytes.length, bytes, 0)
  return bytes
}

function assertClean(file: string, when: string): void {
  const outcome = runPeer('qemu-img', ['check', '-f', 'qcow2', file])
  assert.equal(outcome.status, 0, `${when}: ${outcome.stdout}${outcome.stderr}`)
}

/** An image, what it must hold, and what each of its snapshots must. */
interface Subject {
  readonly file: string
  readonly base: string | undefined
  model: Buffer
  readonly snapshots: Map<string, Buffer>
  readonly random: Random
}

async function withImage<T>(
  subject: Subject,
  access: 'read' | 'write',
  work: (image: Qcow2Image) => Promise<T>,
): Promise<T> {
  const image = await openQcow2(realHost, subject.file, { name: 'image' })
  const below: Layer | undefined =
    subject.base === undefined ? undefined : await openRaw(realHost, subject.base, { name: 'base' })
  image.backing = below
  try {
    await image.setAccess(access)
    return await work(image)
  } finally {
    await image.close()
    await below?.close()
  }
}

async function churn(image: Qcow2Image, { model, random }: Subject): Promise<void> {
  for (let i = 0; i < 12; i++) {
    const offset = roundDown(random.below(image.size), 512)
    const length = Math.min(image.size - offset, 512 * random.between(1, 300))
    if (random.chance(0.25)) {
      await image.zero(offset, length, random.chance(0.5) ? 2 : 0)
      model.fill(0, offset, offset + length)
    } else {
      const bytes = random.fill(Buffer.alloc(length))
      await image.write(offset, length, bytes, 0, 0)
      model.set(bytes, offset)
    }
  }
}

function churnByQemu({ file, model, random }: Subject): void {
  const commands = Array.from({ length: 5 }, () => {
    const offset = roundDown(random.below(model.length), 512)
    const length = Math.min(model.length - offset, 512 * random.between(1, 200))
    const pattern = random.between(1, 255)
    model.fill(pattern, offset, offset + length)
    return ['-c', `write -P ${pattern} ${offset} ${length}`]
  })
  peer('qemu-io', '-f', 'qcow2', ...commands.flat(), file)
}

type Turn = (subject: Subject) => Promise<void>

const TURNS: Readonly<Record<string, Turn>> = {
  'Varve writes': (subject) => withImage(subject, 'write', (image) => churn(image, subject)),
  'QEMU writes': async (subject) => churnByQemu(subject),
  'Varve makes a snapshot': (subject) =>
    withImage(subject, 'write', async (image) => {
      await churn(image, subject)
      const { id } = await image.createSnapshot(`by Varve ${subject.random.below(1e9)}`)
      subject.snapshots.set(id, Buffer.from(subject.model))
      await churn(image, subject)
    }),
  'QEMU makes a snapshot': async (subject) => {
    peer('qemu-img', 'snapshot', '-c', `by QEMU ${subject.random.below(1e9)}`, subject.file)
    await withImage(subject, 'read', async ({ snapshots }) => {
      subject.snapshots.set(snapshots.at(-1)?.id ?? '', Buffer.from(subject.model))
    })
  },
  'Varve applies one': (subject) =>
    withImage(subject, 'write', async (image) => {
      const id = anyOf(subject)
      if (id === undefined) return
      await image.applySnapshot(id)
      subject.model = Buffer.from(subject.snapshots.get(id) as Buffer)
      await churn(image, subject)
    }),
  'QEMU applies one': async (subject) => {
    const id = anyOf(subject)
    if (id === undefined) return
    peer('qemu-img', 'snapshot', '-a', id, subject.file)
    subject.model = Buffer.from(subject.snapshots.get(id) as Buffer)
  },
  'Varve deletes one': (subject) =>
    withImage(subject, 'write', async (image) => {
      const id = anyOf(subject)
      if (id === undefined) return
      await image.deleteSnapshot(id)
      subject.snapshots.delete(id)
      await churn(image, subject)
    }),
  'QEMU deletes one': async (subject) => {
    const id = anyOf(subject)
    if (id === undefined) return
    // QEMU's tool deletes by name alone.
    const name = await withImage(
      subject,
      'read',
      async ({ snapshots }) => snapshots.find((one) => one.id === id)?.name ?? '',
    )
    peer('qemu-img', 'snapshot', '-d', name, subject.file)
    subject.snapshots.delete(id)
  },
}

function anyOf({ snapshots, random }: Subject): string | undefined {
  const ids = [...snapshots.keys()]
  return ids[random.below(Math.max(1, ids.length))]
}

async function assertEqual(subject: Subject, when: string): Promise<void> {
  await withImage(subject, 'read', async (image) => {
    assert.ok((await contentOf(image)).equals(subject.model), `${when}: the disk`)
    assert.deepEqual(new Set(image.snapshots.map(({ id }) => id)), new Set(subject.snapshots.keys()), when)
    for (const [id, bytes] of subject.snapshots) {
      const view = await image.openSnapshot(id)
      assert.ok((await contentOf(view)).equals(bytes), `${when}: snapshot ${id}`)
      await view.close()
    }
    const { corruptions, leaks, problems } = await image.check()
    assert.deepEqual([corruptions, leaks], [0, 0], `${when}: ${problems.join('\n')}`)
  })
}

function assertEqualInQemu({ file, snapshots, model }: Subject, when: string): void {
  const flat = `${file}.raw`
  peer('qemu-img', 'convert', '-f', 'qcow2', '-O', 'raw', file, flat)
  assert.ok(fs.readFileSync(flat).equals(model), `${when}: the disk in QEMU`)
  for (const [id, bytes] of snapshots) {
    // QEMU shows a snapshot with the size that the disk has now.
    if (bytes.length !== model.length) continue
    peer('qemu-img', 'convert', '-l', `snapshot.id=${id}`, '-f', 'qcow2', '-O', 'raw', file, flat)
    assert.ok(fs.readFileSync(flat).equals(bytes), `${when}: snapshot ${id} in QEMU`)
  }
}

interface Setting {
  readonly name: string
  readonly options: string
  readonly isCompressed?: boolean
  readonly hasBacking?: boolean
}

const SETTINGS: readonly Setting[] = [
  { name: 'clusters of 512', options: 'cluster_size=512' },
  { name: 'clusters of 4 KiB, refcounts of 64 bits', options: 'cluster_size=4k,refcount_bits=64' },
  { name: 'clusters of 64 KiB, compressed', options: 'cluster_size=64k', isCompressed: true },
  {
    name: 'clusters of 4 KiB, compressed with zstd',
    options: 'cluster_size=4k,compression_type=zstd',
    isCompressed: true,
  },
  { name: 'clusters of 2 MiB', options: 'cluster_size=2M' },
  { name: 'extended L2 entries', options: 'cluster_size=64k,extended_l2=on' },
  { name: 'version 2', options: 'compat=0.10,cluster_size=4k' },
  { name: 'version 2, compressed', options: 'compat=0.10', isCompressed: true },
  { name: 'over a backing file', options: 'cluster_size=64k', hasBacking: true },
]

suite('internal snapshots between QEMU and Varve', { skip: missing('qemu-img', 'qemu-io') }, () => {
  const seed = seedOfRun()
  for (const [index, { name, options, isCompressed = false, hasBacking = false }] of SETTINGS.entries()) {
    test(`either goes on where the other left off: ${name}`, async (t) => {
      t.diagnostic(`VARVE_SEED=${seed}`)
      const random = new Random(seed + index)
      const folder = tempFolder(t)
      const file = path.join(folder, 'image.qcow2')
      const size = 3 * MIB + 1536
      const source = path.join(folder, 'source.raw')
      const model = Buffer.alloc(size)
      for (let at = 0; at < size; at += 200 * KIB) model.fill(`varve ${at} `, at, Math.min(size, at + 150 * KIB))
      fs.writeFileSync(source, model)
      const target = ['-O', 'qcow2', '-o', options]
      if (hasBacking) peer('qemu-img', 'create', '-f', 'qcow2', '-o', options, '-b', source, '-F', 'raw', file)
      else peer('qemu-img', 'convert', ...(isCompressed ? ['-c'] : []), '-f', 'raw', ...target, source, file)
      const base = hasBacking ? source : undefined
      const subject: Subject = { file, base, model, snapshots: new Map(), random }
      const names = Object.keys(TURNS)
      for (let turn = 0; turn < 24; turn++) {
        const what = names[random.below(names.length)] as string
        const when = `seed ${seed}, turn ${turn}, ${what}`
        await TURNS[what]?.(subject)
        assertClean(file, when)
        await assertEqual(subject, when)
      }
      assertEqualInQemu(subject, `seed ${seed}`)
      await withImage(subject, 'write', async (image) => {
        for (const id of subject.snapshots.keys()) await image.deleteSnapshot(id)
        subject.snapshots.clear()
      })
      assertClean(file, 'without snapshots')
      await assertEqual(subject, 'without snapshots')
    })
  }

  for (const [bits, most] of [
    [1, 0],
    [2, 2],
    [4, 14],
  ] as const) {
    test(`refcounts of ${bits} bits hold ${most} snapshots; one more is refused, and nothing is changed`, async (t) => {
      const folder = tempFolder(t)
      const file = path.join(folder, 'image.qcow2')
      peer('qemu-img', 'create', '-f', 'qcow2', '-o', `refcount_bits=${bits},cluster_size=4k`, file, '4M')
      const subject: Subject = {
        file,
        base: undefined,
        model: Buffer.alloc(4 * MIB),
        snapshots: new Map(),
        random: new Random(1),
      }
      await withImage(subject, 'write', async (image) => {
        await churn(image, subject)
        for (let i = 0; i < most; i++)
          subject.snapshots.set((await image.createSnapshot(`s${i}`)).id, Buffer.from(subject.model))
        await assert.rejects(image.createSnapshot('too many'), (error) => isBlockError(error, 'unsupported'))
        await churn(image, subject)
      })
      assertClean(file, 'after the refusal')
      await assertEqual(subject, 'after the refusal')
      await withImage(subject, 'write', async (image) => {
        if (most > 0) await image.deleteSnapshot('1')
        subject.snapshots.delete('1')
        await churn(image, subject)
      })
      assertClean(file, 'after a deletion')
      await assertEqual(subject, 'after a deletion')
    })
  }

  test('a snapshot of a disk that was resized since keeps its size, and brings it back', async (t) => {
    const file = path.join(tempFolder(t), 'image.qcow2')
    peer('qemu-img', 'create', '-f', 'qcow2', '-o', 'cluster_size=512', file, '1M')
    const subject: Subject = {
      file,
      base: undefined,
      model: Buffer.alloc(MIB),
      snapshots: new Map(),
      random: new Random(2),
    }
    await withImage(subject, 'write', async (image) => {
      await churn(image, subject)
      subject.snapshots.set((await image.createSnapshot('small')).id, Buffer.from(subject.model))
      await image.grow(5 * MIB)
      subject.model = Buffer.concat([subject.model, Buffer.alloc(4 * MIB)])
      await churn(image, subject)
      subject.snapshots.set((await image.createSnapshot('large')).id, Buffer.from(subject.model))
    })
    await assertEqual(subject, 'two sizes')
    for (const [name, id] of [
      ['small', '1'],
      ['large', '2'],
    ] as const) {
      await withImage(subject, 'write', async (image) => {
        await image.applySnapshot(name)
        subject.model = Buffer.from(subject.snapshots.get(id) as Buffer)
        await churn(image, subject)
      })
      assertClean(file, name)
      await assertEqual(subject, name)
      assertEqualInQemu(subject, name)
    }
  })

  test('an open snapshot is not deleted and not written; ids win over names, and missing ones are said', async (t) => {
    const file = path.join(tempFolder(t), 'image.qcow2')
    peer('qemu-img', 'create', '-f', 'qcow2', file, '1M')
    const subject: Subject = {
      file,
      base: undefined,
      model: Buffer.alloc(MIB),
      snapshots: new Map(),
      random: new Random(3),
    }
    await withImage(subject, 'write', async (image) => {
      await image.createSnapshot('2')
      await churn(image, subject)
      await image.createSnapshot('one')
      const view = await image.openSnapshot('2')
      assert.ok((await contentOf(view)).equals(subject.model), 'id 2, not the one of that name')
      await assert.rejects(view.setAccess('write'), (error) => isBlockError(error, 'permission'))
      await assert.rejects(image.deleteSnapshot('one'), (error) => isBlockError(error, 'busy'))
      await view.close()
      await image.deleteSnapshot('one')
      await assert.rejects(image.openSnapshot('one'), (error) => isBlockError(error, 'not-found'))
      await assert.rejects(image.createSnapshot(''), (error) => isBlockError(error, 'invalid-argument'))
      await assert.rejects(image.createSnapshot('x'.repeat(256)), (error) => isBlockError(error, 'invalid-argument'))
    })
    const listed = JSON.parse(peer('qemu-img', 'info', '--output=json', file)) as {
      snapshots: { id: string; name: string }[]
    }
    assert.deepEqual(
      listed.snapshots.map(({ id, name }) => [id, name]),
      [['1', '2']],
    )
  })

  test('a snapshot with the state of a machine keeps it through all that Varve does, and QEMU loads it', {
    skip: missing('qemu-system-x86_64'),
  }, async (t) => {
    const file = path.join(tempFolder(t), 'image.qcow2')
    peer('qemu-img', 'create', '-f', 'qcow2', '-o', 'cluster_size=4k', file, '4M')
    const monitor = (commands: string): string => {
      const drive = `if=none,id=d,file=${file},format=qcow2`
      const machine = ['-M', 'microvm', '-m', '16', '-S', '-display', 'none', '-nodefaults', '-monitor', 'stdio']
      const outcome = runPeer('qemu-system-x86_64', [...machine, '-drive', drive], `${commands}\nquit\n`)
      assert.equal(outcome.status, 0, outcome.stderr)
      return outcome.stdout + outcome.stderr
    }
    const subject: Subject = {
      file,
      base: undefined,
      model: Buffer.alloc(4 * MIB),
      snapshots: new Map(),
      random: new Random(4),
    }
    await withImage(subject, 'write', (image) => churn(image, subject))
    assert.doesNotMatch(monitor('savevm running'), /error/i)
    subject.snapshots.set('1', Buffer.from(subject.model))
    await assertEqual(subject, 'saved by QEMU')
    await withImage(subject, 'write', async (image) => {
      assert.ok((image.snapshots[0]?.vmStateSize ?? 0) > 0)
      await churn(image, subject)
      subject.snapshots.set((await image.createSnapshot('later')).id, Buffer.from(subject.model))
      await churn(image, subject)
      await image.applySnapshot('running')
      subject.model = Buffer.from(subject.snapshots.get('1') as Buffer)
      await churn(image, subject)
      await image.deleteSnapshot('later')
      subject.snapshots.delete('2')
    })
    assertClean(file, 'after Varve')
    await assertEqual(subject, 'after Varve')
    assert.doesNotMatch(monitor('loadvm running'), /error/i)
    subject.model = Buffer.from(subject.snapshots.get('1') as Buffer)
    assertClean(file, 'loaded by QEMU')
    await assertEqual(subject, 'loaded by QEMU')
  })
})
