// What qcow2 images QEMU can make, as a list: every combination of the options that change how an image looks on disk. The
// rules say what `qemu-img create` refuses; matrix.test.ts asks it. Nothing is made or opened here: that is trial.ts.
//
//   axis           values                          every value of one with every value of the others,
//   version        0.10, 1.1                       less what the rules take out
//   cluster size   512 bytes ... 2 MiB
//   ...

import { Random } from '../../src/base/random.ts'

const KIB = 1024

export const AXES = {
  version: ['0.10', '1.1'],
  clusterSize: [512, 4 * KIB, 16 * KIB, 64 * KIB, 2048 * KIB],
  refcountBits: [1, 2, 4, 8, 16, 32, 64],
  /** How the first content is stored, and by which method: 'none' is not compressed. */
  compression: ['none', 'zlib', 'zstd'],
  extendedL2: [false, true],
  dataFile: ['none', 'plain', 'raw'],
  lazyRefcounts: [false, true],
  /** Images below this one. */
  depth: [0, 1, 3],
} as const

export type Axis = keyof typeof AXES
export type Combination = { readonly [A in Axis]: (typeof AXES)[A][number] }

export const AXIS_NAMES = Object.keys(AXES) as Axis[]

interface Rule {
  readonly refuses: (c: Combination) => boolean
  readonly why: string
}

/** What QEMU 7.2 refuses to create. */
const CREATE_RULES: readonly Rule[] = [
  { refuses: (c) => c.version === '0.10' && c.refcountBits !== 16, why: 'version 2 has refcounts of 16 bits' },
  { refuses: (c) => c.version === '0.10' && c.compression === 'zstd', why: 'version 2 compresses with zlib' },
  { refuses: (c) => c.version === '0.10' && c.extendedL2, why: 'version 2 has no feature bits' },
  { refuses: (c) => c.version === '0.10' && c.dataFile !== 'none', why: 'version 2 has no feature bits' },
  { refuses: (c) => c.version === '0.10' && c.lazyRefcounts, why: 'version 2 has no dirty bit' },
  { refuses: (c) => c.extendedL2 && c.clusterSize < 16 * KIB, why: 'subclusters have at least 512 bytes' },
  { refuses: (c) => c.dataFile === 'raw' && c.depth > 0, why: 'a raw data file alone is the whole disk' },
]

/** What it creates and cannot fill. */
const CONTENT_RULES: readonly Rule[] = [
  {
    refuses: (c) => c.dataFile !== 'none' && c.compression !== 'none',
    why: 'a data file holds no compressed clusters',
  },
]

/** Why `qemu-img create` refuses the combination; undefined when it does not. */
export function createRefusal(c: Combination): string | undefined {
  return CREATE_RULES.find((rule) => rule.refuses(c))?.why
}

/** All values of all axes, also what QEMU refuses. */
export function allCombinations(): Combination[] {
  let partial: object[] = [{}]
  for (const axis of AXIS_NAMES) partial = partial.flatMap((c) => AXES[axis].map((value) => ({ ...c, [axis]: value })))
  return partial as Combination[]
}

/** What QEMU can make. The place in this list is a combination's number. */
export const COMBINATIONS: readonly Combination[] = allCombinations().filter(
  (c) => ![...CREATE_RULES, ...CONTENT_RULES].some((rule) => rule.refuses(c)),
)

/** For `qemu-img create -o`. A data file is at `dataFilePath`. */
export function createOptions(c: Combination, dataFilePath: string): string {
  const options = [`compat=${c.version}`, `cluster_size=${c.clusterSize}`, `refcount_bits=${c.refcountBits}`]
  if (c.compression === 'zstd') options.push('compression_type=zstd')
  if (c.extendedL2) options.push('extended_l2=on')
  if (c.dataFile !== 'none') options.push(`data_file=${dataFilePath}`)
  if (c.dataFile === 'raw') options.push('data_file_raw=on')
  if (c.lazyRefcounts) options.push('lazy_refcounts=on')
  return options.join(',')
}

/** In few words: "1.1 64k rc16 zstd extl2 data:raw lazy depth3". */
export function describe(c: Combination): string {
  const words = [c.version, `${c.clusterSize < KIB ? c.clusterSize : `${c.clusterSize / KIB}k`}`, `rc${c.refcountBits}`]
  if (c.compression !== 'none') words.push(c.compression)
  if (c.extendedL2) words.push('extl2')
  if (c.dataFile !== 'none') words.push(`data:${c.dataFile}`)
  if (c.lazyRefcounts) words.push('lazy')
  return [...words, `depth${c.depth}`].join(' ')
}

/** Numbers of a few combinations that hold every pair of values that any combination holds, in a random order. */
export function pairwise(random: Random): number[] {
  const open = new Map<number, string[]>(COMBINATIONS.map((c, number) => [number, pairsOf(c)]))
  const wanted = new Set([...open.values()].flat())
  const chosen: number[] = []
  while (wanted.size > 0) {
    const most = (pairs: readonly string[]): number => pairs.filter((pair) => wanted.has(pair)).length
    // The best of a few: the best of all would hardly make the list shorter.
    const candidates = Array.from({ length: 60 }, () => random.below(COMBINATIONS.length))
    const rest = [...open].find(([, pairs]) => most(pairs) > 0)
    if (rest !== undefined) candidates.push(rest[0])
    const scored = candidates.map((number) => ({ number, gain: most(open.get(number) ?? []) }))
    const best = scored.reduce((a, b) => (b.gain > a.gain ? b : a))
    chosen.push(best.number)
    for (const pair of open.get(best.number) ?? []) wanted.delete(pair)
    open.delete(best.number)
  }
  return chosen
}

/** Every two values that stand together in a combination. */
export function pairsOf(c: Combination): string[] {
  const values = AXIS_NAMES.map((axis) => `${axis}=${c[axis]}`)
  return values.flatMap((a, index) => values.slice(index + 1).map((b) => `${a} ${b}`))
}

/** The seed of one combination in a run. */
export function seedOf(runSeed: number, number: number): number {
  return new Random(runSeed + Math.imul(number + 1, 0x9e37_79b1)).next()
}
