// Who has a file open, as far as this user may look: for the message that says why an image cannot be had. It asks /proc,
// which shows the open files of one's own processes, or of all to root; elsewhere nobody is found.

import fs from 'node:fs'

export interface Holder {
  readonly pid: number
  /** The program's name as the kernel has it, at most 15 characters. */
  readonly name: string
}

interface Handle {
  readonly pid: number
  readonly holdsLock: boolean
}

/** Other processes that have the file at `path` open; where some hold locks on it, only those. */
export function findHolders(path: string): Holder[] {
  const wanted = identityOf(path)
  if (wanted === undefined) return []
  const handles: Handle[] = []
  for (const entry of namesIn('/proc')) {
    const pid = Number(entry)
    if (!Number.isInteger(pid) || pid === process.pid) continue
    for (const fd of namesIn(`/proc/${pid}/fd`)) {
      if (identityOf(`/proc/${pid}/fd/${fd}`) === wanted) handles.push({ pid, holdsLock: holdsLock(pid, fd) })
    }
  }
  const lockers = handles.filter((handle) => handle.holdsLock)
  const pids = new Set((lockers.length > 0 ? lockers : handles).map((handle) => handle.pid))
  return [...pids].map((pid) => ({ pid, name: textOf(`/proc/${pid}/comm`).trim() || 'a process' }))
}

/** "qemu-system-x86 (pid 123)", with "another process" where nobody is known. */
export function describeHolders(holders: readonly Holder[]): string {
  return holders.map(({ name, pid }) => `${name} (pid ${pid})`).join(', ') || 'another process'
}

/** Whoever opened the file through this descriptor also locked part of it. */
function holdsLock(pid: number, fd: string): boolean {
  return /^lock:/m.test(textOf(`/proc/${pid}/fdinfo/${fd}`))
}

// A process that ends meanwhile, or that belongs to somebody else, is one that nothing is known of.

function identityOf(path: string): string | undefined {
  try {
    const { dev, ino } = fs.statSync(path)
    return `${dev}:${ino}`
  } catch {
    return undefined
  }
}

function namesIn(folder: string): string[] {
  try {
    return fs.readdirSync(folder)
  } catch {
    return []
  }
}

function textOf(path: string): string {
  try {
    return fs.readFileSync(path, 'utf8')
  } catch {
    return ''
  }
}
