// What a real guest's writes take while its disk is backed up to something slow, 5 MB a second: with the disk in QEMU's own hands by Varve, by a reader of
// the same moment that throws away what it reads, and by QEMU's own blockdev-backup; and with the disk at Varve. In turns, each beside no backup.
//
//   node bench/guest-backup.ts [--rounds 3] [--seconds 6] [--mib 256] [--rate 200] [--only qemu|varve]
//
// fio runs in the guest, whose processor is emulated: what counts are the ratios. The figures of a run are in docs/internals/guests.md.

import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { parseArgs } from 'node:util'
import { connectNbd } from '../src/nbd/client.ts'
import { initRepositoryAt } from '../src/shard/repositories.ts'
import { disksOf, readGraph } from '../src/source/qemu/block-graph.ts'
import { removeLeftovers } from '../src/source/qemu/leftovers.ts'
import { exportMoment, prepareMoment, takeMoment } from '../src/source/qemu/moment.ts'
import { newTag, nodeNames } from '../src/source/qemu/names.ts'
import { QmpClient } from '../src/source/qemu/qmp-client.ts'
import { fileDisk, GuestMachine, nbdDisk } from '../test/guest/machine.ts'
import { type Daemon, startDaemon } from './daemon.ts'
import { makeImage } from './images.ts'
import { check, DISK_FOLDER, MIB } from './machine.ts'
import { median } from './results.ts'
import { makeSlowExport, makeSlowFolder } from './slow-target.ts'

const { values } = parseArgs({
  options: {
    rounds: { type: 'string', default: '3' },
    seconds: { type: 'string', default: '6' },
    mib: { type: 'string', default: '256' },
    rate: { type: 'string', default: '200' },
    only: { type: 'string', default: '' },
  },
})
const ROUNDS = Number(values.rounds)
const SECONDS = Number(values.seconds)
const SIZE_MIB = Number(values.mib)
const PIECE = MIB / 4

/** Begins what the guest is to notice little of; returns what ends it and takes away what is left. */
type Begin = () => Promise<() => Promise<void>>

const nothing: Begin = () => Promise.resolve(() => Promise.resolve())

/** A file system with fio and its libraries, for a guest that has none. */
function makeTools(image: string): void {
  const root = `${image}.root`
  fs.mkdirSync(root)
  const fio = check('which', 'fio').trim()
  fs.copyFileSync(fio, path.join(root, 'fio'))
  for (const [file] of check('ldd', fio).matchAll(/\/\S+/g)) fs.copyFileSync(file, path.join(root, path.basename(file)))
  fs.writeFileSync(image, '')
  fs.truncateSync(image, 256 * MIB)
  check('mke2fs', '-q', '-F', '-t', 'ext4', '-d', root, image)
  fs.rmSync(root, { recursive: true })
}

/** The 99th percentile of the guest's writes, in milliseconds. */
async function measure(guest: GuestMachine): Promise<number> {
  const tools = '/disks/tools'
  const load = `--name=w --filename=/dev/vda --direct=1 --rw=randwrite --bs=4k --rate_iops=${values.rate} --thread`
  const term = `--time_based --runtime=${SECONDS} --output-format=json --output=/fio.json`
  await guest.run(`mkdir -p /tmp; ${tools}/ld-linux-x86-64.so.2 --library-path ${tools} ${tools}/fio ${load} ${term}`)
  const said = await guest.run(`grep -A40 '"write" :' /fio.json | grep '99.000000' | head -n 1`)
  const [, nanoseconds] = /"99\.000000" : (\d+)/.exec(said) ?? []
  if (nanoseconds === undefined) throw new Error(`fio in the guest said: ${said}`)
  return Number(nanoseconds) / 1e6
}

async function compare(guest: GuestMachine, ways: Readonly<Record<string, Begin>>): Promise<void> {
  const found = new Map<string, number[]>()
  for (let round = 0; round < ROUNDS; round++)
    for (const [name, begin] of Object.entries({ 'no backup': nothing, ...ways })) {
      const end = await begin()
      found.set(name, [...(found.get(name) ?? []), await measure(guest)])
      await end()
    }
  const base = median(found.get('no backup') ?? [])
  for (const [name, all] of found) {
    const p99 = median(all)
    console.log(`  ${name.padEnd(34)} ${p99.toFixed(2).padStart(9)} ms ${(p99 / base).toFixed(2).padStart(8)}`)
  }
}

/** A backup of Varve's to the slow repository. */
function varveBackup({ api }: Daemon, disk: string, repository: string): Begin {
  return async () => {
    const { id } = await api.call('backup', {}, { disks: [disk], repository, full: true })
    return async () => {
      await api.call('sayToJob', { job: id, verb: 'cancel' }, {})
      await api.follow(id, () => undefined)
    }
  }
}

/** The moment that Varve would take, whose reader throws away what it reads. */
function nullReader(qmp: string): Begin {
  return async () => {
    const client = await QmpClient.open(qmp)
    const tag = newTag()
    const socket = path.join(folder, 'null.sock')
    const [disk] = disksOf(await readGraph(client), tag)
    if (disk?.top === undefined || disk.node === undefined || disk.device === undefined) throw new Error('no disk')
    const scratch = { path: path.join(folder, 'scratch.qcow2'), bytes: SIZE_MIB * MIB * 2 }
    fs.rmSync(scratch.path, { force: true })
    check('qemu-img', 'create', '-q', '-f', 'qcow2', scratch.path, `${SIZE_MIB}M`)
    fs.truncateSync(scratch.path, scratch.bytes)
    const recording = { name: `null-${Date.now()}`, granularity: 65536, persistent: false }
    const { top, node, device } = disk
    const moment = {
      disks: [{ top, node, device, recording, scratch }],
      name: nodeNames(tag, Date.now()),
      socket,
    }
    await prepareMoment(client, moment)
    await takeMoment(client, moment)
    const [uri = ''] = await exportMoment(client, moment, false)
    const reader = await connectNbd(uri)
    let isOver = false
    const reading = (async () => {
      const buffer = Buffer.alloc(PIECE)
      for (let at = 0; !isOver; at = (at + PIECE) % reader.size) await reader.read(at, PIECE, buffer, 0)
    })()
    return async () => {
      isOver = true
      await reading
      await reader.close()
      await removeLeftovers(client, tag, socket)
      await client.execute('block-dirty-bitmap-remove', { node, name: recording.name })
      client.close()
    }
  }
}

/** blockdev-backup onto the slow export. */
function qemuBackup(qmp: string, slow: string): Begin {
  return async () => {
    const client = await QmpClient.open(qmp)
    const server = { type: 'unix', path: slow }
    await client.execute('blockdev-add', { driver: 'nbd', 'node-name': 'slow', server })
    await client.execute('blockdev-backup', { 'job-id': 'slow', device: 'vda', target: 'slow', sync: 'full' })
    return async () => {
      await client.execute('block-job-cancel', { device: 'slow', force: true })
      while (((await client.execute('query-jobs')) as unknown[]).length > 0)
        await new Promise((resolve) => setTimeout(resolve, 20))
      await client.execute('blockdev-del', { 'node-name': 'slow' })
      client.close()
    }
  }
}

interface Setting {
  readonly daemon: Daemon
  /** On a file system of 5 MB a second. */
  readonly repository: string
  /** Images: a file system with fio, and the disk that is backed up. */
  readonly tools: string
  readonly image: string
  /** Where the guest's monitor will be. */
  readonly qmp: string
}

async function diskInQemu({ daemon, repository, tools, image, qmp }: Setting): Promise<void> {
  console.log('disk in QEMU:')
  const guest = await GuestMachine.boot({
    isWriting: false,
    disks: [fileDisk('vda', image, 'raw'), fileDisk('tools', tools, 'raw')],
    qmp,
  })
  undo.push(() => guest.kill())
  await daemon.api.call('addVm', {}, { name: 'vm', qmp })
  await compare(guest, {
    'Varve, into a slow repository': varveBackup(daemon, 'vm', repository),
    'a reader that throws it away': nullReader(qmp),
    'blockdev-backup, to a slow target': qemuBackup(qmp, path.join(folder, 'slow.sock')),
  })
  await guest.kill()
}

async function diskAtVarve({ daemon, repository, tools, image }: Setting): Promise<void> {
  console.log('disk at Varve:')
  await daemon.api.call('addDisk', {}, { name: 'vda', image, format: 'raw' })
  const disks = [nbdDisk('vda', path.join(folder, 'home', 'run', 'nbd', 'vda.sock')), fileDisk('tools', tools, 'raw')]
  const guest = await GuestMachine.boot({ isWriting: false, disks })
  undo.push(() => guest.kill())
  await compare(guest, { 'Varve, into a slow repository': varveBackup(daemon, 'vda', repository) })
  await guest.kill()
}

const folder = fs.mkdtempSync(path.join(DISK_FOLDER, 'varve-guest-backup-'))
const undo: (() => unknown)[] = [() => fs.rmSync(folder, { recursive: true, force: true })]
try {
  const daemon = await startDaemon(folder)
  undo.push(() => daemon.stop())
  const slowFolder = await makeSlowFolder(folder, SIZE_MIB * 4 + 512)
  undo.push(() => slowFolder.remove())
  const repository = path.join(slowFolder.place, 'repository')
  const slow = await makeSlowExport(folder, SIZE_MIB)
  undo.push(() => slow.remove())
  await (await initRepositoryAt(repository)).close()
  const tools = path.join(folder, 'tools.raw')
  makeTools(tools)
  const image = path.join(folder, 'disk.raw')
  makeImage(image, 'raw', SIZE_MIB)
  const qmp = path.join(folder, 'qmp')
  const setting = { daemon, repository, tools, image, qmp }
  console.log(
    `${os.availableParallelism()} cores, ${SIZE_MIB} MiB raw; p99 of the guest's writes, medians of ${ROUNDS} rounds`,
  )
  if (values.only !== 'varve') await diskInQemu(setting)
  if (values.only !== 'qemu') await diskAtVarve(setting)
} finally {
  for (const step of undo.toReversed()) await step()
}
