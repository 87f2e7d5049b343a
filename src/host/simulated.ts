// A host in memory that loses what a real one may lose. Tests run on it, kill it or cut its power at any operation, and
// look at what is left. One folder tree; no symbolic links, no block devices, no permissions.
//
//   write ---> live content (page cache) ---sync---> durable content        the changes in between are `unsynced`
//   create, rename, unlink ---> live names ---syncFolder---> durable names  the changes in between are `unsyncedNames`
//
// killProcess: handles and claims go, all live content and names stay, the boot id stays.
// crash (power loss): of each file's unsynced changes any subset is kept, each whole or torn at sectors of 512 bytes, a
//   longer or shorter file likewise; of the unsynced name changes any prefix is kept, in the order in which they were made,
//   and a rename is whole or not at all. The boot id changes. Folders are durable as soon as they are made.
// A sync of a file does not make its name durable. A sync that a hook makes fail loses what it should have written, and
//   the next one succeeds without it: so Linux does.
// Between the call of a sync and its completion a crash may still lose everything.

import path from 'node:path'
import type { Random } from '../base/random.ts'
import type { ExtentVisitor, Pending } from '../block/device.ts'
import { BlockError } from '../block/error.ts'
import { type Change, Content } from './content.ts'
import type { FileStatus, Host, HostFile, OpenOptions } from './host.ts'

/** What the host is about to do; handed to `beforeOperation`. */
export interface HostOperation {
  readonly kind: 'open' | 'create' | 'rename' | 'unlink' | 'syncFolder' | 'read' | 'sync' | Change['kind']
  readonly path: string
  /** 1 for the first operation of this host or of the clone's origin, and so on. */
  readonly number: number
}

export interface SimulatedOptions {
  /** Bytes of pages that fit; a change that would take more fails with kind 'no-space'. Unlimited unless told. */
  readonly capacity?: number
  /** With it, half of the file operations complete later, in an order that it chooses; else all within the call but sync. */
  readonly scheduler?: Random
}

/** What a power loss keeps of the changes that were not synced. */
export type Keep = 'all' | 'none' | Random

interface Node {
  readonly id: number
  live: Content
  durable: Content
  unsynced: Change[]
  modifiedMs: number
}

interface NameChange {
  readonly folders: readonly string[]
  /** Paths and what they name afterwards; undefined for nothing. */
  readonly names: readonly (readonly [path: string, node: Node | undefined])[]
}

export class SimulatedHost implements Host {
  /** Called before each operation. May throw, which fails the operation, or kill or crash this host. */
  beforeOperation: ((operation: HostOperation) => void) | undefined
  readonly #options: SimulatedOptions
  #folders = new Set(['/'])
  #names = new Map<string, Node>()
  #durableNames = new Map<string, Node>()
  #unsyncedNames: NameChange[] = []
  readonly #open = new Set<SimulatedFile>()
  readonly #waiting: (() => void)[] = []
  #operations = 0
  #nodes = 0
  #boots = 0
  #life = 0

  constructor(options: SimulatedOptions = {}) {
    this.#options = options
  }

  /** How many operations were begun. */
  get operations(): number {
    return this.#operations
  }

  /** An independent host with the same files and boot id, and no open handles: what a killed process leaves. */
  clone(options: SimulatedOptions = this.#options): SimulatedHost {
    const other = new SimulatedHost(options)
    const copies = new Map<Node, Node>()
    const copyOf = (node: Node): Node => {
      let copy = copies.get(node)
      if (copy === undefined) {
        copy = { ...node, live: node.live.clone(), durable: node.durable.clone(), unsynced: node.unsynced.slice() }
        copies.set(node, copy)
      }
      return copy
    }
    const copyNames = (names: Map<string, Node>): Map<string, Node> =>
      new Map(Array.from(names, ([name, node]) => [name, copyOf(node)]))
    other.#folders = new Set(this.#folders)
    other.#names = copyNames(this.#names)
    other.#durableNames = copyNames(this.#durableNames)
    other.#unsyncedNames = this.#unsyncedNames.map(({ folders, names }) => ({
      folders,
      names: names.map(([name, node]) => [name, node === undefined ? undefined : copyOf(node)] as const),
    }))
    other.#operations = this.#operations
    other.#nodes = this.#nodes
    other.#boots = this.#boots
    return other
  }

  /** The process dies: its handles fail with kind 'closed' from now on, and its claims are gone. */
  killProcess(): void {
    this.#life++
    for (const file of this.#open) file.drop()
    this.#open.clear()
  }

  /** The power fails and comes back. */
  crash(keep: Keep): void {
    this.killProcess()
    this.#boots++
    const kept = countKept(this.#unsyncedNames.length, keep)
    for (const change of this.#unsyncedNames.splice(0, kept)) applyNames(this.#durableNames, change)
    this.#unsyncedNames = []
    this.#names = new Map(this.#durableNames)
    for (const node of new Set(this.#names.values())) {
      for (const change of node.unsynced) keepSome(node.durable, change, keep)
      node.unsynced = []
      node.live = node.durable.clone()
    }
  }

  bootId(): string {
    return `00000000-0000-4000-8000-${String(this.#boots).padStart(12, '0')}`
  }

  async open(name: string, options: OpenOptions = {}): Promise<HostFile> {
    const at = normal(name)
    const create = options.create ?? 'never'
    let node = this.#names.get(at)
    this.begin(node === undefined && create !== 'never' ? 'create' : 'open', at)
    if (this.#folders.has(at)) throw failure('invalid-argument', at, 'is neither a file nor a block device')
    if (node !== undefined && create === 'exclusive') throw failure('exists', at, 'exists')
    if (node === undefined) {
      if (create === 'never' || !this.#folders.has(path.dirname(at))) throw failure('not-found', at, 'does not exist')
      node = { id: ++this.#nodes, live: new Content(), durable: new Content(), unsynced: [], modifiedMs: 0 }
      this.#changeNames({ folders: [path.dirname(at)], names: [[at, node]] })
    }
    const file = new SimulatedFile(this, at, node, options.write === true)
    if (options.lock !== undefined) file.lock(options.lock)
    this.#open.add(file)
    return file
  }

  async status(name: string): Promise<FileStatus | undefined> {
    const at = normal(name)
    const node = this.#names.get(at)
    if (node !== undefined) {
      const { size, allocated } = node.live
      return { kind: 'file', size, allocated, identity: `simulated:${node.id}`, modifiedMs: node.modifiedMs }
    }
    if (!this.#folders.has(at)) return undefined
    return { kind: 'folder', size: 0, allocated: 0, identity: `simulated:${at}`, modifiedMs: 0 }
  }

  async realPath(name: string): Promise<string> {
    const at = normal(name)
    if (!this.#names.has(at) && !this.#folders.has(at)) throw failure('not-found', at, 'does not exist')
    return at
  }

  async list(folder: string): Promise<string[]> {
    const at = normal(folder)
    const all = [...this.#names.keys(), ...this.#folders].filter((name) => name !== '/' && path.dirname(name) === at)
    return all.map((name) => path.basename(name)).sort()
  }

  async makeFolder(folder: string): Promise<void> {
    for (let at = normal(folder); !this.#folders.has(at); at = path.dirname(at)) {
      if (this.#names.has(at)) throw failure('exists', at, 'is a file')
      this.#folders.add(at)
    }
  }

  async rename(from: string, to: string): Promise<void> {
    const [source, target] = [normal(from), normal(to)]
    this.begin('rename', source)
    const node = this.#names.get(source)
    if (node === undefined || !this.#folders.has(path.dirname(target)))
      throw failure('not-found', source, `or the folder of ${target} does not exist`)
    if (source === target) return
    this.#changeNames({
      folders: [path.dirname(source), path.dirname(target)],
      names: [
        [source, undefined],
        [target, node],
      ],
    })
  }

  async unlink(name: string): Promise<void> {
    const at = normal(name)
    this.begin('unlink', at)
    if (this.#names.has(at)) this.#changeNames({ folders: [path.dirname(at)], names: [[at, undefined]] })
  }

  async syncFolder(folder: string): Promise<void> {
    const at = normal(folder)
    this.begin('syncFolder', at)
    if (!this.#folders.has(at)) throw failure('not-found', at, 'does not exist')
    // A rename between two folders brings along what was done before in the other one.
    const folders = new Set([at])
    const synced = new Set<NameChange>()
    for (const change of this.#unsyncedNames.toReversed()) {
      if (!change.folders.some((touched) => folders.has(touched))) continue
      for (const touched of change.folders) folders.add(touched)
      synced.add(change)
    }
    for (const change of this.#unsyncedNames) if (synced.has(change)) applyNames(this.#durableNames, change)
    this.#unsyncedNames = this.#unsyncedNames.filter((change) => !synced.has(change))
  }

  /** For SimulatedFile: counts the operation and lets the hook have its say. */
  begin(kind: HostOperation['kind'], at: string): void {
    const life = this.#life
    this.#operations++
    this.beforeOperation?.({ kind, path: at, number: this.#operations })
    if (life !== this.#life) throw failure('closed', at, `${kind}: the process died`)
  }

  /** For SimulatedFile: runs `work` in the call, or later in an order of the scheduler's. */
  run(work: () => void): Pending {
    const random = this.#options.scheduler
    if (random === undefined || random.chance(0.5)) {
      work()
      return undefined
    }
    return this.#later(work, random)
  }

  /** For SimulatedFile: runs `work` after the call. */
  async runLater(work: () => void): Promise<void> {
    if (this.#options.scheduler !== undefined) return this.#later(work, this.#options.scheduler)
    await Promise.resolve()
    work()
  }

  /** For SimulatedFile: fails when the change does not fit. */
  reserve(at: string, node: Node, change: Change): void {
    const { capacity } = this.#options
    if (capacity === undefined) return
    const nodes = new Set([...this.#names.values(), ...Array.from(this.#open, (file) => file.node)])
    let used = node.live.wouldAllocate(change)
    for (const each of nodes) used += each.live.allocated
    if (used > capacity) throw failure('no-space', at, `${change.kind}: no space left on the simulated host`)
  }

  /** For SimulatedFile: fails when another handle's claim excludes this one. */
  checkClaim(file: SimulatedFile, claim: 'read' | 'write'): void {
    for (const other of this.#open) {
      if (other === file || other.node !== file.node || other.claim === undefined) continue
      if (claim === 'write' || other.claim === 'write') throw failure('busy', file.path, 'is in use by another handle')
    }
  }

  forget(file: SimulatedFile): void {
    this.#open.delete(file)
  }

  #later(work: () => void, random: Random): Promise<void> {
    return new Promise((resolve, reject) => {
      this.#waiting.push(() => {
        try {
          work()
          resolve()
        } catch (error) {
          reject(error as Error)
        }
      })
      setImmediate(() => this.#waiting.splice(random.below(this.#waiting.length), 1)[0]?.())
    })
  }

  #changeNames(change: NameChange): void {
    applyNames(this.#names, change)
    this.#unsyncedNames.push(change)
  }
}

class SimulatedFile implements HostFile {
  readonly path: string
  readonly writable: boolean
  readonly node: Node
  claim: 'read' | 'write' | undefined
  readonly #host: SimulatedHost
  #state: 'open' | 'closed' = 'open'

  constructor(host: SimulatedHost, at: string, node: Node, writable: boolean) {
    this.#host = host
    this.path = at
    this.node = node
    this.writable = writable
  }

  size(): number {
    this.#checkOpen('size')
    return this.node.live.size
  }

  read(offset: number, length: number, into: Uint8Array, at: number): Pending {
    this.#begin('read')
    return this.#host.run(() => {
      this.#checkOpen('read')
      this.node.live.read(offset, length, into, at)
    })
  }

  readNow(offset: number, length: number, into: Uint8Array, at: number): void {
    this.#begin('read')
    this.#checkOpen('read')
    this.node.live.read(offset, length, into, at)
  }

  write(offset: number, length: number, from: Uint8Array, at: number): Pending {
    return this.#change('write', () => ({
      kind: 'write',
      offset,
      data: new Uint8Array(from.subarray(at, at + length)),
    }))
  }

  punch(offset: number, length: number): Pending {
    return this.#change('punch', () => ({ kind: 'punch', offset, length }))
  }

  zero(offset: number, length: number): Pending {
    return this.#change('zero', () => ({ kind: 'zero', offset, length }))
  }

  truncate(size: number): Pending {
    return this.#change('truncate', () => ({ kind: 'truncate', size }))
  }

  extents(offset: number, length: number, visit: ExtentVisitor): Pending {
    this.#checkOpen('extents')
    this.node.live.extents(offset, length, visit)
    return undefined
  }

  async sync(): Promise<void> {
    const { node } = this
    const covered = node.unsynced.length
    try {
      this.#begin('sync')
    } catch (error) {
      if (this.#state === 'open') node.unsynced.splice(0, covered)
      throw error
    }
    const changes = node.unsynced.slice(0, covered)
    await this.#host.runLater(() => {
      this.#checkOpen('sync')
      // Another sync may have taken all of them meanwhile, or the first ones.
      const [next] = node.unsynced
      const left = next === undefined || !changes.includes(next) ? [] : changes.slice(changes.indexOf(next))
      for (const change of left) node.durable.apply(change)
      node.unsynced.splice(0, left.length)
    })
  }

  lock(claim: 'read' | 'write' | undefined): void {
    this.#checkOpen('lock')
    if (claim !== undefined) this.#host.checkClaim(this, claim)
    this.claim = claim
  }

  async close(): Promise<void> {
    this.drop()
    this.#host.forget(this)
  }

  /** The handle is gone, with its claim. */
  drop(): void {
    this.#state = 'closed'
    this.claim = undefined
  }

  /** The buffer is looked at when the change is made: it is the file's until completion. */
  #change(kind: Change['kind'], make: () => Change): Pending {
    this.#begin(kind)
    if (!this.writable) throw failure('read-only', this.path, `${kind}: it was opened for reading only`)
    return this.#host.run(() => {
      this.#checkOpen(kind)
      const change = make()
      this.#host.reserve(this.path, this.node, change)
      this.node.live.apply(change)
      this.node.unsynced.push(change)
      this.node.modifiedMs++
    })
  }

  #begin(kind: HostOperation['kind']): void {
    this.#checkOpen(kind)
    this.#host.begin(kind, this.path)
  }

  #checkOpen(doing: string): void {
    if (this.#state === 'closed') throw failure('closed', this.path, `${doing} after close`)
  }
}

function normal(name: string): string {
  return path.resolve('/', name)
}

function failure(kind: BlockError['kind'], at: string, problem: string): BlockError {
  return new BlockError(kind, `${at} ${problem}`, { path: at })
}

function applyNames(names: Map<string, Node>, change: NameChange): void {
  for (const [name, node] of change.names) {
    if (node === undefined) names.delete(name)
    else names.set(name, node)
  }
}

function countKept(count: number, keep: Keep): number {
  if (keep === 'all') return count
  return keep === 'none' ? 0 : keep.below(count + 1)
}

function keepSome(content: Content, change: Change, keep: Keep): void {
  if (keep === 'all') content.apply(change)
  if (keep === 'all' || keep === 'none') return
  const fate = keep.below(3)
  if (fate === 0) content.apply(change)
  else if (fate === 1) content.applyTorn(change, keep)
}
