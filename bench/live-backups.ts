// Live backups of a disk under load by two programs: a process that serves the disk, and copies a moment of it, all or what changed, at
// a limited speed. Varve can besides export the moment to a reader.

import fs from 'node:fs'
import path from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { initRepositoryAt } from '../src/shard/repositories.ts'
import { connectNbd } from '../src/nbd/client.ts'
import { addDisk, startDaemon } from './daemon.ts'
import { check, MIB } from './machine.ts'
import { answers, type RunningProcess, startProcess } from './process.ts'
import { Qmp } from './qmp.ts'
import { STORAGE_DAEMON, VARVE } from './servers.ts'

/** A moment under way. */
export interface UnderWay {
  /** Resolves when it is copied, or broke. */
  readonly ended: Promise<void>
}

export interface Served extends RunningProcess {
  readonly uri: string
  /** Takes the moment and begins to copy all of it, or what changed since the last one; bytes per second. */
  backUp(full: boolean, speed: number): Promise<UnderWay>
  /** Takes the moment for a reader, who reads so many bytes a second and says so, or nothing. */
  export?(speed: number): Promise<UnderWay>
}

export interface Stage {
  /** Empty: for sockets, the home, and what is copied. */
  readonly folder: string
  /** A raw image. */
  readonly image: string
  /** Bytes of copy space, where the program has that. */
  readonly scratchBytes?: number
}

export interface Rival {
  readonly program: string
  readonly version: () => string | undefined
  readonly serve: (stage: Stage) => Promise<Served>
}

export const VARVE_BACKUPS: Rival = {
  program: 'varve serve',
  version: VARVE.version,
  serve: async ({ folder, image, scratchBytes }) => {
    const scratch = scratchBytes === undefined ? [] : ['--scratch', String(scratchBytes)]
    const daemon = await startDaemon(folder, ...scratch)
    const { api, pid } = daemon
    const disk = `disk-${path.parse(image).name}`
    const ended = async (id: string): Promise<void> => {
      const { error } = await api.follow(id, () => undefined)
      if (error !== undefined && error.kind !== 'no-space') throw new Error(error.message)
    }
    try {
      const uri = await addDisk(daemon, image, 'raw')
      const repository = path.join(folder, 'repository')
      await (await initRepositoryAt(repository)).close()
      return {
        pid,
        uri,
        stop: () => daemon.stop(),
        backUp: async (full, speed) => {
          const { id } = await api.call('backup', {}, { disks: [disk], repository, full, speed })
          return { ended: ended(id) }
        },
        export: async (speed) => {
          const { id, details } = await api.call('openView', {}, { disks: [disk], acknowledge: true })
          const [first] = details['exports'] as { uri: string }[]
          const all = ended(id)
          if (speed > 0) void readSlowly(first?.uri ?? '', speed).catch(() => undefined)
          return { ended: all }
        },
      }
    } catch (error) {
      await daemon.stop()
      throw error
    }
  },
}

/** A mebibyte at a time, until it can be read no longer. */
async function readSlowly(uri: string, speed: number): Promise<void> {
  const client = await connectNbd(uri)
  const piece = Buffer.alloc(MIB)
  try {
    for (let at = 0; at < client.size; at += MIB) {
      await client.read(at, MIB, piece, 0)
      await client.trim(at, MIB, 0)
      await sleep((MIB / speed) * 1000)
    }
  } finally {
    await client.close()
  }
}

export const STORAGE_DAEMON_BACKUPS: Rival = {
  program: STORAGE_DAEMON.name,
  version: STORAGE_DAEMON.version,
  serve: async ({ folder, image }) => {
    const [nbd, monitor] = ['nbd', 'qmp'].map((name) => path.join(folder, `${name}.sock`)) as [string, string]
    const running = await startProcess(
      [
        'qemu-storage-daemon',
        '--chardev',
        `socket,id=qmp,path=${monitor},server=on,wait=off`,
        '--monitor',
        'chardev=qmp',
        '--nbd-server',
        `addr.type=unix,addr.path=${nbd}`,
        '--blockdev',
        `driver=file,node-name=file,filename=${image},aio=io_uring,discard=unmap`,
        '--blockdev',
        'driver=raw,node-name=disk,file=file,discard=unmap',
        '--export',
        'type=nbd,id=disk,node-name=disk,name=disk,writable=on',
      ],
      () => answers({ path: nbd }),
    )
    const qmp = await Qmp.connect(monitor)
    let number = 0
    const backUp = async (full: boolean, speed: number): Promise<UnderWay> => {
      const target = `target${++number}`
      const place = path.join(folder, `${target}.qcow2`)
      check('qemu-img', 'create', '-q', '-f', 'qcow2', place, String(fs.statSync(image).size))
      const file = { driver: 'file', filename: place, aio: 'io_uring', discard: 'unmap' }
      await qmp.execute('blockdev-add', { driver: 'qcow2', 'node-name': target, file, discard: 'unmap' })
      const bitmap = { node: 'disk', name: 'changed' }
      const sync = full ? { sync: 'full' } : { sync: 'bitmap', bitmap: bitmap.name, 'bitmap-mode': 'on-success' }
      const given = { 'job-id': target, device: 'disk', target, speed, 'auto-dismiss': false, ...sync }
      const marks = full && number === 1 ? [{ type: 'block-dirty-bitmap-add', data: bitmap }] : []
      await qmp.execute('transaction', { actions: [...marks, { type: 'blockdev-backup', data: given }] })
      const all = qmp.jobEnded(target).then(() => qmp.execute('blockdev-del', { 'node-name': target }))
      return { ended: all.then(() => fs.rmSync(place)) }
    }
    const stop = async (): Promise<void> => {
      qmp.close()
      await running.stop()
    }
    return { pid: running.pid, stop, uri: `nbd+unix:///disk?socket=${nbd}`, backUp }
  },
}
