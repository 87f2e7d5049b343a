// What QEMU makes of a crash state: it reads what Varve reads there, from the image as it was found and again when it has repaired
// it; and of an image that Varve repaired, wrote to and closed it finds nothing wrong. Only a few states are shown to it: each
// costs several processes.

import assert from 'node:assert/strict'
import { spawnSync } from 'node:child_process'
import fs from 'node:fs'
import path from 'node:path'
import { backingOf, IMAGE, type Setting } from './qcow2-run.ts'
import type { State } from './qcow2-states.ts'

/**
 * A power loss may keep entries and not the end of the file that they lead to. QEMU reads zeros there, as Varve does, but its repair
 * puts new refcounts in these places: such an image is for Varve to repair.
 */
const LOST = /exceeding the end of the file by one cluster or more/

export class QemuPeer {
  /** How many states it has seen. */
  seen = 0
  /** How many of them only Varve can repair. */
  lost = 0
  readonly #folder: string

  /** `folder` is empty, and for this alone. */
  constructor(folder: string, setting: Setting) {
    this.#folder = folder
    const backing = backingOf(setting)
    if (backing !== undefined) fs.writeFileSync(path.join(folder, 'base'), backing.bytes)
  }

  /** In the folder, to which QEMU takes the name of a data file to be relative. */
  #run(args: readonly string[]): { status: number | null; said: string } {
    const { status, stdout, stderr } = spawnSync('qemu-img', args, { cwd: this.#folder, encoding: 'utf8' })
    return { status, said: `${stdout}${stderr}` }
  }

  /** Fails when QEMU does not read `content` from the state. `when`: as it was found, or closed by Varve. */
  look(state: State, content: Uint8Array, when: 'found' | 'closed'): void {
    this.seen++
    for (const [name, file] of state.disk.files)
      fs.writeFileSync(path.join(this.#folder, path.basename(name)), file.bytes.subarray(0, file.size))
    this.#compare(content, `what was ${when}`)
    const image = path.basename(IMAGE)
    const check = this.#run(['check', '-f', 'qcow2', image])
    if (when === 'found' && state.manner !== 'kill' && LOST.test(check.said)) {
      this.lost++
      return
    }
    if (when === 'closed') return assert.equal(check.status, 0, `QEMU's check of what Varve closed: ${check.said}`)
    const repair = this.#run(['check', '-f', 'qcow2', '-r', 'all', image])
    assert.equal(repair.status, 0, `QEMU's repair of what was found: ${repair.said}`)
    this.#compare(content, 'what it repaired')
  }

  #compare(content: Uint8Array, what: string): void {
    const convert = this.#run(['convert', '-f', 'qcow2', '-O', 'raw', path.basename(IMAGE), 'raw'])
    assert.equal(convert.status, 0, `QEMU reads ${what}: ${convert.said}`)
    const bytes = fs.readFileSync(path.join(this.#folder, 'raw'))
    const at = bytes.findIndex((byte, i) => byte !== content[i])
    assert.ok(bytes.length === content.length && at < 0, `QEMU reads otherwise ${what}, from byte ${at} on`)
  }
}
