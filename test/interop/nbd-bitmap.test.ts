// `varve nbd --bitmap`: a persistent bitmap of the image, made by QEMU, as QEMU's and libnbd's clients see it over NBD.

import assert from 'node:assert/strict'
import path from 'node:path'
import { suite, test, type TestContext } from 'node:test'
import { beginCommand, checkRefusal, STATUS } from '../support/site.ts'
import { missing, peer } from '../support/peer.ts'
import { tempFolder } from '../support/temp.ts'

const MIB = 1024 * 1024

/** 8 MiB with the bitmaps "daily", of which the second MiB is dirty, and "weekly". */
function makeImage(t: TestContext): string {
  const image = path.join(tempFolder(t), 'disk.qcow2')
  peer('qemu-img', 'create', '-f', 'qcow2', image, '8M')
  peer('qemu-img', 'bitmap', '--add', '-g', '64k', image, 'daily')
  peer('qemu-io', '-f', 'qcow2', '-c', 'write 1M 1M', image)
  peer('qemu-img', 'bitmap', '--add', image, 'weekly')
  return image
}

/** Serves the image until the test calls what this returns, which waits for a clean end. */
async function serve(image: string, ...args: string[]): Promise<{ socket: string; stop: () => Promise<void> }> {
  const socket = `${image}.sock`
  const running = beginCommand(['nbd', image, '-f', 'qcow2', '--socket', socket, ...args])
  await new Promise<void>((resolve) => {
    running.child.stdout?.once('data', () => resolve())
    running.child.once('close', () => resolve())
  })
  const stop = async (): Promise<void> => {
    running.child.kill('SIGTERM')
    const { status, stderr } = await running.ended
    assert.equal(status, 0, stderr)
  }
  return { socket, stop }
}

/** What nbdinfo says is dirty. */
function dirtyOf(socket: string, bitmap: string): number[][] {
  const map = peer('nbdinfo', '--json', `--map=qemu:dirty-bitmap:${bitmap}`, `nbd+unix:///?socket=${socket}`)
  const extents = JSON.parse(map) as { offset: number; length: number; type: number }[]
  return extents.filter(({ type }) => type === 1).map(({ offset, length }) => [offset, length])
}

suite('a bitmap of the image over NBD', {
  skip: missing('qemu-img', 'qemu-io', 'nbdinfo'),
}, () => {
  test('nbdinfo and qemu-img see it, with what clients write meanwhile, and QEMU finds that in the image', async (t) => {
    const image = makeImage(t)
    const { socket, stop } = await serve(image, '--bitmap', 'daily')
    assert.deepEqual(dirtyOf(socket, 'daily'), [[MIB, MIB]])
    peer('qemu-io', '-f', 'raw', '-c', 'write 4M 64k', `nbd+unix:///?socket=${socket}`)
    const now = [
      [MIB, MIB],
      [4 * MIB, 65_536],
    ]
    assert.deepEqual(dirtyOf(socket, 'daily'), now)
    const options = `driver=nbd,server.type=unix,server.path=${socket},x-dirty-bitmap=qemu:dirty-bitmap:daily`
    // Through this option QEMU shows what is dirty as a hole.
    const map = JSON.parse(peer('qemu-img', 'map', '--output=json', '--image-opts', options)) as {
      start: number
      length: number
      data: boolean
    }[]
    assert.deepEqual(
      map.filter(({ data }) => !data).map(({ start, length }) => [start, length]),
      now,
    )
    await stop()
    const again = await serve(image, '--bitmap', 'daily', '--read-only')
    assert.deepEqual(dirtyOf(again.socket, 'daily'), now)
    await again.stop()
    peer('qemu-img', 'check', image)
  })

  test('a bitmap that is not there is refused with the names of those that are', async (t) => {
    const image = makeImage(t)
    const args = ['nbd', image, '-f', 'qcow2', '--socket', `${image}.sock`, '--bitmap', 'hourly']
    checkRefusal(
      args,
      await beginCommand(args).ended,
      STATUS.notFound,
      /no bitmap "hourly": it has only "daily", "weekly"/,
    )
    const raw = ['nbd', image, '-f', 'raw', '--socket', `${image}.sock`, '--bitmap', 'daily', '--read-only']
    checkRefusal(raw, await beginCommand(raw).ended, STATUS.failed, /raw image, which has no bitmaps/)
  })
})
