// A machine in a QEMU of its own, whose backups are struck: Varve or QEMU is killed at a random moment of one. After each strike every backup
// that is in the repository is what the disks were at its moment, the next one works, by changes whenever QEMU still has the bitmaps,
// and QEMU has nothing of Varve's but one bitmap of each disk.

import assert from 'node:assert/strict'
import { setTimeout as delay } from 'node:timers/promises'
import { Random } from '../../src/base/random.ts'
import { isBlockError } from '../../src/block/error.ts'
import { openRepositoryAt } from '../../src/shard/repositories.ts'
import { peer } from '../support/peer.ts'
import { type MachineDisk, QemuMachine } from '../support/qemu-machine.ts'
import type { Site } from '../support/site.ts'

const SIZE = 8 * 2 ** 20
const UNIT = 4096
const NAME = 'struck'

export type Victim = 'varve' | 'qemu'

export interface KillFigures {
  kills: number
  /** Strikes that came before the moment was taken, while it was copied, and when it was over. */
  readonly during: Map<string, number>
  backups: number
  incremental: number
  /** Milliseconds that a backup takes undisturbed. */
  usualMs: number
}

interface Disk extends MachineDisk {
  /** What the guest has flushed. */
  content: Buffer
}

export class KilledVm {
  readonly figures: KillFigures = { kills: 0, during: new Map(), backups: 0, incremental: 0, usualMs: 0 }
  readonly #site: Site
  readonly #random: Random
  readonly #owner: { after(work: () => void): void }
  readonly #disks: readonly Disk[]
  readonly #checked = new Set<string>()
  #machine: QemuMachine | undefined
  #baseline: readonly string[] = []

  constructor(site: Site, seed: number, owner: { after(work: () => void): void }) {
    this.#site = site
    this.#random = new Random(seed)
    this.#owner = owner
    this.#disks = (['qcow2', 'raw'] as const).map((format) => {
      const file = site.path(`struck.${format}`)
      peer('qemu-img', 'create', '-q', '-f', format, file, String(SIZE))
      return { id: `d-${format}`, file, format, content: Buffer.alloc(SIZE) }
    })
  }

  async start(): Promise<void> {
    await this.#boot()
    await this.#site.done('vm', 'add', NAME, '--qmp', this.#qemu.qmp)
    this.#baseline = await this.#nodes()
    await this.#write()
    await this.#backUp('full')
    await this.#write()
    const began = performance.now()
    await this.#backUp('incremental')
    this.figures.usualMs = Math.ceil(performance.now() - began)
  }

  /** One strike, and all that must be so after it. */
  async kill(victim: Victim): Promise<void> {
    await this.#write()
    const before = this.#disks.map(({ content }) => Buffer.from(content))
    const phase = await this.#strike(victim)
    this.figures.kills++
    this.figures.during.set(phase, (this.figures.during.get(phase) ?? 0) + 1)
    await this.#settled()
    await this.#checkNew(before)
    await this.#write()
    await this.#backUp(victim === 'varve' ? 'incremental' : undefined)
  }

  /** Begins a backup and kills; returns how far it was. */
  async #strike(victim: Victim): Promise<string> {
    const { api } = this.#site.daemon
    let phase = 'before its moment'
    const asked = api
      .call('backup', {}, { disks: [NAME], repository: this.#site.repository })
      .then(async ({ id }) => {
        phase = 'while it was copied'
        await api.follow(id, () => undefined)
        phase = 'after its end'
      })
      .catch((error: unknown) => {
        if (!isBlockError(error)) throw error
      })
    await delay(this.#random.below(this.figures.usualMs))
    const struck = phase
    if (victim === 'varve') await this.#site.daemon.kill()
    else await this.#qemu.stop()
    await asked
    if (victim === 'varve') await this.#site.daemon.start()
    else await this.#boot()
    return struck
  }

  /** No job runs any more: one that Varve's start found has begun anew. */
  async #settled(): Promise<void> {
    const { api } = this.#site.daemon
    for (const { id, endedMs } of await api.call('listJobs', {}, {}))
      if (endedMs === undefined) await api.follow(id, () => undefined)
  }

  async #backUp(kind: 'full' | 'incremental' | undefined): Promise<void> {
    const { api } = this.#site.daemon
    const { id } = await api.call('backup', {}, { disks: [NAME], repository: this.#site.repository })
    const { error, details } = await api.follow(id, () => undefined)
    assert.equal(error, undefined, error?.message)
    const disks = details['disks'] as { kind: string; reason: string }[]
    if (kind !== undefined)
      for (const disk of disks) assert.equal(disk.kind, kind, `${JSON.stringify(disks)}\n${this.#site.log()}`)
    this.figures.backups++
    if (disks.every((disk) => disk.kind === 'incremental')) this.figures.incremental++
    await this.#checkNew(this.#disks.map(({ content }) => content))
    assert.deepEqual(await this.#nodes(), this.#baseline)
    assert.deepEqual(await this.#qemu.ask('query-block-exports'), [])
    for (const { id: disk } of this.#disks) {
      const bitmaps = await this.#bitmaps(disk)
      assert.equal(bitmaps.length, 1, `one bitmap of ${disk}: ${JSON.stringify(bitmaps)}\n${this.#site.log()}`)
    }
  }

  /** Backups that were not looked at yet hold this. */
  async #checkNew(contents: readonly Buffer[]): Promise<void> {
    const repository = await openRepositoryAt(this.#site.repository)
    try {
      for (const { id } of await repository.backups()) {
        if (this.#checked.has(id)) continue
        this.#checked.add(id)
        const reader = await repository.openBackup(id)
        try {
          for (const [index, { id: disk }] of this.#disks.entries()) {
            const found = Buffer.alloc(SIZE)
            await reader.disks.find(({ name }) => name === `${NAME}.${disk}`)?.device.read(0, SIZE, found, 0)
            assert.ok(found.equals(contents[index] as Buffer), `${disk} in ${id} is as it was\n${this.#site.log()}`)
          }
        } finally {
          await reader.close()
        }
      }
    } finally {
      await repository.close()
    }
  }

  /** A few writes of the guest, flushed: QEMU's cache of mappings goes with it. */
  async #write(): Promise<void> {
    for (const disk of this.#disks) {
      for (let count = 1 + this.#random.below(3); count > 0; count--) {
        const length = UNIT * (1 + this.#random.below(24))
        const offset = UNIT * this.#random.below((SIZE - length) / UNIT)
        const byte = 1 + this.#random.below(255)
        await this.#qemu.io(disk.id, `write -P ${byte} ${offset} ${length}`)
        disk.content.fill(byte, offset, offset + length)
      }
      await this.#qemu.io(disk.id, 'flush')
    }
  }

  get #qemu(): QemuMachine {
    assert.ok(this.#machine !== undefined)
    return this.#machine
  }

  async #boot(): Promise<void> {
    this.#machine = await QemuMachine.start(this.#owner, this.#disks, { qmp: this.#site.path('struck.qmp') })
  }

  async #named(): Promise<{ readonly 'node-name': string; readonly 'dirty-bitmaps'?: readonly unknown[] }[]> {
    return (await this.#qemu.ask('query-named-block-nodes', { flat: true })) as { 'node-name': string }[]
  }

  /** Those that are not called by QEMU, whose names are random. */
  async #nodes(): Promise<string[]> {
    const names = (await this.#named()).map((node) => node['node-name'])
    return [...names.filter((name) => !name.startsWith('#')), String(names.length)].toSorted()
  }

  async #bitmaps(disk: string): Promise<readonly unknown[]> {
    return (await this.#named()).find((node) => node['node-name'] === `node-${disk}`)?.['dirty-bitmaps'] ?? []
  }
}
