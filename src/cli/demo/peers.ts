// What other programs say of the demo's files, where they are installed: e2fsck, qemu-img check, qemu-img compare.

import { spawnSync } from 'node:child_process'
import { hasProgram } from './image.ts'

export interface Finding {
  readonly good: boolean
  readonly text: string
}

/** e2fsck of an ext4 image, reading only. Undefined where it is not installed. */
export function checkFileSystem(image: string): Finding | undefined {
  return ask('e2fsck', ['-fn', image], 'e2fsck clean')
}

/** qemu-img check of a qcow2 image. */
export function checkImage(image: string): Finding | undefined {
  return ask('qemu-img', ['check', '-f', 'qcow2', image], 'qemu-img check clean')
}

/** qemu-img compare of a qcow2 and a raw image. */
export function compareImages(qcow2: string, raw: string): Finding | undefined {
  return ask('qemu-img', ['compare', '-f', 'qcow2', '-F', 'raw', qcow2, raw], 'qemu-img compare identical')
}

function ask(program: string, args: readonly string[], good: string): Finding | undefined {
  if (!hasProgram(program)) return undefined
  const result = spawnSync(program, args, { encoding: 'utf8' })
  if (result.status === 0) return { good: true, text: good }
  return { good: false, text: `${program} says: ${(result.stdout + result.stderr).trim()}` }
}
