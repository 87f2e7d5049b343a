// A libvirt of its own for tests: the real daemon, alone in folders of the test's by a mount namespace (which takes root), with machines whose
// processors never run. What a guest would do to its disks a test does through the same devices, by the monitor's qemu-io.

import assert from 'node:assert/strict'
import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import fs from 'node:fs'
import path from 'node:path'
import { type TestContext } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import { missing, type Outcome, peer, runPeer } from './peer.ts'
import { notRoot } from './site.ts'
import { tempFolder } from './temp.ts'

const PATIENCE_MS = 60_000
/** Where it keeps its things, and in which folder of ours. */
const FOLDERS = { etc: '/etc/libvirt', lib: '/var/lib/libvirt', log: '/var/log/libvirt', run: '/run/libvirt' } as const
const QEMU_CONF = `user = "root"
group = "root"
security_driver = "none"
stdio_handler = "file"
cgroup_controllers = []
namespaces = []
`

/** Whom Debian's libvirt looks for when it starts, whatever it is told, and who comes with the package of its services; of any number. */
const QEMU_USER = { passwd: 'libvirt-qemu:x:64055:64055::/nonexistent:/bin/false', group: 'libvirt-qemu:x:64055:' }

const CHANNEL = `<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>`

/** For node:test's `skip` option. */
export function libvirtMissing(): string | false {
  return missing('virsh', 'libvirtd', 'qemu-system-x86_64', 'qemu-img', 'qemu-io') || notRoot
}

export interface DomainDisk {
  readonly target: string
  readonly format: 'raw' | 'qcow2'
  /** None in an empty drive. */
  readonly file?: string
  readonly device?: 'disk' | 'cdrom'
  readonly isReadOnly?: boolean
}

export class Libvirt {
  readonly uri: string
  readonly #folder: string
  readonly #child: ChildProcess

  private constructor(folder: string, child: ChildProcess) {
    this.#folder = folder
    this.#child = child
    this.uri = `qemu+unix:///system?socket=${path.join(folder, 'run', 'libvirt-sock')}`
  }

  /** It ends with the test, and its machines with it. */
  static async start(t: Pick<TestContext, 'after'>): Promise<Libvirt> {
    const folder = tempFolder(t)
    for (const name of Object.keys(FOLDERS)) fs.mkdirSync(path.join(folder, name))
    fs.writeFileSync(path.join(folder, 'etc', 'qemu.conf'), QEMU_CONF)
    fs.writeFileSync(path.join(folder, 'etc', 'libvirtd.conf'), 'auth_unix_rw = "none"\nauth_unix_ro = "none"\n')
    const mounts = Object.entries(FOLDERS).map(([name, at]) => `mkdir -p ${at}; mount --bind ${folder}/${name} ${at}`)
    for (const [name, line] of Object.entries(QEMU_USER)) {
      const known = fs.readFileSync(`/etc/${name}`, 'utf8')
      if (known.includes('libvirt-qemu:')) continue
      fs.writeFileSync(path.join(folder, name), `${known}${line}\n`)
      mounts.push(`mount --bind ${folder}/${name} /etc/${name}`)
    }
    const script = `set -e; ${mounts.join('; ')}; exec libvirtd -f /etc/libvirt/libvirtd.conf -p ${folder}/pid`
    const log = fs.openSync(path.join(folder, 'libvirtd.log'), 'w')
    const child = spawn('unshare', ['-m', 'sh', '-c', script], { stdio: ['ignore', log, log] })
    fs.closeSync(log)
    const libvirt = new Libvirt(folder, child)
    t.after(() => libvirt.#end())
    for (const deadline = performance.now() + PATIENCE_MS; libvirt.try('version').status !== 0; await sleep(50)) {
      const said = (): string => fs.readFileSync(path.join(folder, 'libvirtd.log'), 'utf8')
      assert.ok(child.exitCode === null && performance.now() < deadline, `libvirtd did not start: ${said()}`)
    }
    return libvirt
  }

  try(...args: string[]): Outcome {
    return runPeer('virsh', ['-c', this.uri, '-q', ...args])
  }

  /** A command of virsh's that must succeed; what it said. */
  virsh(...args: string[]): string {
    return peer('virsh', '-c', this.uri, '-q', ...args).trim()
  }

  /** Defines a machine, with a guest agent's channel if told, and starts it. */
  domain(name: string, disks: readonly DomainDisk[], hasAgent = false): void {
    const file = path.join(this.#folder, `${name}.xml`)
    fs.writeFileSync(
      file,
      `<domain type='qemu'><name>${name}</name><memory unit='MiB'>32</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='pc'>hvm</type></os>
<devices><emulator>/usr/bin/qemu-system-x86_64</emulator>${disks.map(diskXml).join('')}${hasAgent ? CHANNEL : ''}<memballoon model='none'/></devices></domain>`,
    )
    this.virsh('define', file)
    this.virsh('start', name, '--paused')
  }

  /** A command of qemu-io as the guest's device would do it: of the virtio disk with this number. */
  io(domain: string, disk: number, command: string): void {
    const device = `/machine/peripheral/virtio-disk${disk}/virtio-backend`
    const said = this.virsh('qemu-monitor-command', domain, '--hmp', `qemu-io -d ${device} "${command}"`)
    assert.equal(said, '', `qemu-io ${command}: ${said}`)
  }

  /** Its checkpoints, whether a backup job is at work, and the nodes that somebody named. */
  has(domain: string): { readonly checkpoints: string[]; readonly isBackedUp: boolean; readonly nodes: number } {
    const names = this.virsh('checkpoint-list', domain, '--name').split('\n')
    const said = JSON.parse(this.virsh('qemu-monitor-command', domain, '{"execute":"query-named-block-nodes"}')) as {
      return: unknown[]
    }
    return {
      checkpoints: names.map((name) => name.trim()).filter((name) => name !== ''),
      isBackedUp: this.try('backup-dumpxml', domain).status === 0,
      nodes: said.return.length,
    }
  }

  /** SIGKILL for a machine's QEMU; returns when libvirt knows. */
  async kill(domain: string): Promise<void> {
    process.kill(this.#pid(domain), 'SIGKILL')
    for (
      const deadline = performance.now() + PATIENCE_MS;
      this.virsh('domstate', domain) !== 'shut off';
      await sleep(20)
    )
      assert.ok(performance.now() < deadline, `libvirt notices that ${domain} is gone`)
  }

  #pid(domain: string): number {
    return Number(fs.readFileSync(path.join(this.#folder, 'run', 'qemu', `${domain}.pid`), 'utf8'))
  }

  /** Machines outlive their libvirt. */
  async #end(): Promise<void> {
    const files = fs.readdirSync(path.join(this.#folder, 'run', 'qemu')).filter((name) => name.endsWith('.pid'))
    for (const domain of files.filter((name) => name !== 'driver.pid').map((name) => path.basename(name, '.pid')))
      process.kill(this.#pid(domain), 'SIGKILL')
    if (this.#child.exitCode !== null) return
    const ended = once(this.#child, 'exit')
    this.#child.kill('SIGKILL')
    await ended
  }
}

function diskXml({ target, format, file, device = 'disk', isReadOnly = false }: DomainDisk): string {
  const source = file === undefined ? '' : `<source file='${file}'/>`
  const bus = device === 'disk' ? 'virtio' : 'ide'
  return `<disk type='file' device='${device}'><driver name='qemu' type='${format}'/>${source}<target dev='${target}' bus='${bus}'/>${isReadOnly ? '<readonly/>' : ''}</disk>`
}
