// What virsh 9.0 answered when it was asked about a machine "web" with four disks, word for word (test/golden/libvirt-9.0.json), for tests of what is
// made of it. What was not recorded cannot be asked.

import assert from 'node:assert/strict'
import fs from 'node:fs'
import path from 'node:path'
import { Virsh, type VirshOutcome } from '../../src/source/libvirt/virsh.ts'

/** As the machine and its libvirt were when they were asked; undefined for running and at rest. */
export type When = 'a backup job is at work' | 'a copy is at work' | 'shut off' | 'QEMU was killed' | 'libvirt is down'

interface Exchange extends VirshOutcome {
  /** Without the URI and -q. */
  readonly args: readonly string[]
  readonly when?: When
}

const FILE = path.resolve(import.meta.dirname, '..', 'golden', 'libvirt-9.0.json')

/** Asks the recording; `asked` gets the commands, in order. */
export function recordedVirsh(when?: When, asked: string[] = [], domain = 'web'): Virsh {
  const exchanges = JSON.parse(fs.readFileSync(FILE, 'utf8')) as readonly Exchange[]
  return new Virsh({ domain, connect: 'qemu:///system' }, ([option, uri, quiet, ...args]) => {
    assert.deepEqual([option, uri, quiet], ['-c', 'qemu:///system', '-q'])
    asked.push(args.filter((arg) => arg !== '--domain' && arg !== domain).join(' '))
    const same = exchanges.filter((one) => JSON.stringify(one.args) === JSON.stringify(args))
    const found = same.find((one) => one.when === when) ?? same.find((one) => one.when === undefined) ?? same[0]
    assert.ok(found !== undefined, `virsh ${args.join(' ')} is on record`)
    return Promise.resolve(found)
  })
}
