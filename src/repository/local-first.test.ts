import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { backUp, changeSome, initInline, noise } from '../../test/support/backups.ts'
import { Random, seedOfRun } from '../base/random.ts'
import { MemoryDevice } from '../block/memory.ts'
import type { LocalFirst } from './local-first.ts'
import type { Repository } from './repository.ts'
import { CHUNK_BYTES } from './spec.ts'
import { MemoryStore } from './stores/memory.ts'

const MIB = 1024 * 1024

async function besides(repository: Repository, id: string, content: Buffer): Promise<LocalFirst> {
  const local = new MemoryDevice(content.length)
  await local.write(0, content.length, content, 0, 0)
  const [disk] = (await repository.openBackup(id)).disks
  assert.ok(disk !== undefined)
  return disk.besides(local)
}

async function readAll(device: LocalFirst, length: number): Promise<Buffer> {
  const found = Buffer.alloc(length)
  for (let at = 0; at < length; at += MIB) await device.read(at, Math.min(MIB, length - at), found, at)
  return found
}

suite('a backup besides a disk that is much like it', () => {
  test('only chunks in which the disk differs are fetched', async () => {
    const repository = await initInline(new MemoryStore())
    const content = noise(new Random(5), 4 * MIB)
    const { id } = await backUp(repository, content)
    const disk = Buffer.from(content)
    for (const chunk of [0, 17, 18, 63]) disk[chunk * CHUNK_BYTES + 77] = (disk[chunk * CHUNK_BYTES + 77] as number) ^ 1
    const device = await besides(repository, id, disk)
    assert.ok((await readAll(device, content.length)).equals(content))
    const holes = content.length - 64 * CHUNK_BYTES
    assert.ok(device.fetchedBytes <= 4 * CHUNK_BYTES + holes, `${device.fetchedBytes} bytes`)
    const same = await besides(repository, id, content)
    assert.ok((await readAll(same, content.length)).equals(content))
    assert.ok(same.fetchedBytes < device.fetchedBytes)
  })

  test('what it reads is the backup, whatever the disk holds and wherever a read begins', async (t) => {
    const random = new Random(seedOfRun())
    t.diagnostic(`VARVE_SEED=${random.seed}`)
    const repository = await initInline(new MemoryStore())
    const content = noise(random, 2 * MIB + 777)
    const first = await backUp(repository, content)
    const changes = changeSome(content, random, 30, 9000)
    const { id } = await backUp(repository, content, { id: first.id, changes })
    const disk = Buffer.from(content)
    changeSome(disk, random, 20, 100_000)
    const device = await besides(repository, id, disk)
    for (let round = 0; round < 100; round++) {
      const offset = random.below(content.length)
      const length = 1 + random.below(Math.min(content.length - offset, 300_000))
      const into = Buffer.alloc(length + 3, 9)
      await device.read(offset, length, into, 2)
      assert.ok(
        into.subarray(2, length + 2).equals(content.subarray(offset, offset + length)),
        `${length} at ${offset}`,
      )
      assert.ok(into[1] === 9 && into[length + 2] === 9)
    }
  })
})
