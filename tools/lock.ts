// Completes package-lock.json. npm leaves a package's builds for other platforms out of the lock when it cannot or need not
// look at them, and `npm ci` then refuses the lock as incomplete. This adds what is left out: the version that the package
// names, and the platform that the build's name tells, so that no other platform installs it. It changes nothing else;
// checksums are npm's to add.
//
//   node tools/lock.ts      after each change of the dependencies

import fs from 'node:fs'
import path from 'node:path'

export interface LockedPackage {
  readonly version?: string
  readonly dev?: boolean
  readonly optional?: boolean
  readonly os?: readonly string[]
  readonly cpu?: readonly string[]
  readonly libc?: readonly string[]
  readonly optionalDependencies?: Readonly<Record<string, string>>
}

/** By their place: "node_modules/koffi". The project itself is "". */
export type LockedPackages = Record<string, LockedPackage>

const SYSTEMS = ['aix', 'android', 'darwin', 'freebsd', 'linux', 'openbsd', 'openharmony', 'sunos', 'win32']
const PROCESSORS = ['arm', 'arm64', 'ia32', 'loong64', 'mips64el', 'ppc64', 'riscv64', 's390x', 'x64']
const LIBRARIES: Readonly<Record<string, string>> = { gnu: 'glibc', musl: 'musl' }

/** What the lock leaves out, by place. */
export function leftOut(packages: Readonly<LockedPackages>): LockedPackages {
  const found: LockedPackages = {}
  for (const [place, { dev, optionalDependencies }] of Object.entries(packages)) {
    for (const [name, version] of Object.entries(optionalDependencies ?? {})) {
      const isThere = `${place}/node_modules/${name}` in packages || `node_modules/${name}` in packages
      if (isThere) continue
      found[`node_modules/${name}`] = { version, ...(dev === true ? { dev } : {}), optional: true, ...platformOf(name) }
    }
  }
  return found
}

function platformOf(name: string): Pick<LockedPackage, 'os' | 'cpu' | 'libc'> {
  const words = name.split(/[/-]/)
  const os = words.filter((word) => SYSTEMS.includes(word))
  const cpu = words.filter((word) => PROCESSORS.includes(word))
  const libc = words.flatMap((word) => LIBRARIES[word] ?? [])
  return { ...(os.length > 0 ? { os } : {}), ...(cpu.length > 0 ? { cpu } : {}), ...(libc.length > 0 ? { libc } : {}) }
}

export const LOCK = path.resolve(import.meta.dirname, '..', 'package-lock.json')

export function readLock(): { packages: LockedPackages } {
  return JSON.parse(fs.readFileSync(LOCK, 'utf8')) as { packages: LockedPackages }
}

if (import.meta.main) {
  const lock = readLock()
  const added = leftOut(lock.packages)
  const all = Object.entries({ ...lock.packages, ...added }).sort(([a], [b]) => (a < b ? -1 : 1))
  fs.writeFileSync(LOCK, `${JSON.stringify({ ...lock, packages: Object.fromEntries(all) }, undefined, 2)}\n`)
  console.log(`${Object.keys(added).length} packages added`)
}
