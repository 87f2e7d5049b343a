// A disk with a small system on it: busybox, an init that ends in a shell's prompt, and a file of noise. For guests that boot from what a
// backup holds.

import { createHash } from 'node:crypto'
import fs from 'node:fs'
import path from 'node:path'
import { Random } from '../../src/base/random.ts'
import { peer } from '../support/peer.ts'

const INIT = `#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox stty -echo < /dev/console
PS1='guest:/# ' exec /bin/busybox sh -i < /dev/console > /dev/console 2>&1
`

/** Makes a raw image of such a disk of `mib` MiB, a file /noise of `noiseMib` in it; returns the MD5 of that file. */
export function makeSystemDisk(image: string, mib: number, noiseMib: number): string {
  const root = `${image}.root`
  for (const folder of ['bin', 'sbin', 'dev', 'proc']) fs.mkdirSync(path.join(root, folder), { recursive: true })
  fs.copyFileSync('/bin/busybox', path.join(root, 'bin', 'busybox'))
  fs.writeFileSync(path.join(root, 'sbin', 'init'), INIT, { mode: 0o755 })
  const noise = new Random(mib).fill(Buffer.alloc(noiseMib * 1024 * 1024))
  fs.writeFileSync(path.join(root, 'noise'), noise)
  fs.closeSync(fs.openSync(image, 'w'))
  fs.truncateSync(image, mib * 1024 * 1024)
  peer('mke2fs', '-q', '-F', '-t', 'ext4', '-d', root, image)
  fs.rmSync(root, { recursive: true })
  return createHash('md5').update(noise).digest('hex')
}
