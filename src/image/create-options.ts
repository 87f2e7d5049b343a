// What may follow -o when an image is made: the names and values that qemu-img has, one table per format. Only the words are
// judged here; whether they fit together is the format's affair (format/qcow2/create.ts).

import { parseSize } from '../base/size.ts'
import { BlockError } from '../block/error.ts'
import { type Format, isFormat } from '../chain/open.ts'

export const PREALLOCATIONS = ['off', 'metadata', 'falloc', 'full'] as const
export type Preallocation = (typeof PREALLOCATIONS)[number]

/** What -o says, in the words of `createQcow2` and `createRaw`. Sizes in bytes. */
export interface ImageSettings {
  size?: number
  clusterSize?: number
  version?: 2 | 3
  refcountBits?: number
  compression?: 'zlib' | 'zstd'
  extendedL2?: boolean
  dataFile?: string
  dataFileRaw?: boolean
  lazyRefcounts?: boolean
  preallocation?: Preallocation
  backingName?: string
  backingFormat?: Format
}

type Reader<T> = (value: string) => T | undefined

interface Setting {
  /** The values that are possible, for the message. */
  readonly values: string
  /** Puts the value in its place; false when it is none of these. */
  readonly take: (settings: ImageSettings, value: string) => boolean
}

function setting<K extends keyof ImageSettings>(
  field: K,
  values: string,
  read: Reader<NonNullable<ImageSettings[K]>>,
): Setting {
  const take = (settings: ImageSettings, value: string): boolean => {
    const found = read(value)
    if (found !== undefined) settings[field] = found
    return found !== undefined
  }
  return { values, take }
}

const VERSIONS: Readonly<Record<string, 2 | 3>> = { '0.10': 2, v2: 2, '1.1': 3, v3: 3 }
const SWITCH: Readonly<Record<string, boolean>> = {
  on: true,
  yes: true,
  true: true,
  off: false,
  no: false,
  false: false,
}

const oneOf =
  <T extends string>(words: readonly T[]): Reader<T> =>
  (value) =>
    words.find((word) => word === value)
const wholeNumber: Reader<number> = (value) => (/^\d{1,9}$/.test(value) ? Number(value) : undefined)
const anyText: Reader<string> = (value) => (value === '' ? undefined : value)
const onOrOff: Reader<boolean> = (value) => SWITCH[value]

const SIZE = setting('size', 'a size such as 10G', parseSize)

const SETTINGS: Readonly<Record<Format, Readonly<Record<string, Setting>>>> = {
  raw: {
    size: SIZE,
    preallocation: setting('preallocation', 'off, falloc or full', oneOf(['off', 'falloc', 'full'])),
  },
  qcow2: {
    size: SIZE,
    compat: setting('version', '0.10 (v2) or 1.1 (v3)', (value) => VERSIONS[value]),
    backing_file: setting('backingName', 'a file name', anyText),
    backing_fmt: setting('backingFormat', 'raw or qcow2', (value) => (isFormat(value) ? value : undefined)),
    cluster_size: setting('clusterSize', 'a size from 512 to 2M', parseSize),
    compression_type: setting('compression', 'zlib or zstd', oneOf(['zlib', 'zstd'])),
    data_file: setting('dataFile', 'a file name', anyText),
    data_file_raw: setting('dataFileRaw', 'on or off', onOrOff),
    extended_l2: setting('extendedL2', 'on or off', onOrOff),
    lazy_refcounts: setting('lazyRefcounts', 'on or off', onOrOff),
    preallocation: setting('preallocation', PREALLOCATIONS.join(', '), oneOf(PREALLOCATIONS)),
    refcount_bits: setting('refcountBits', '1, 2, 4, 8, 16, 32 or 64', wholeNumber),
  },
}

/**
 * Reads `name=value,name=value`, as given by each -o in turn; ",," is a comma in a value. Kind 'invalid-argument' for a name or
 * value that is none, 'unsupported' for encryption.
 */
export function parseCreateOptions(format: Format, texts: readonly string[]): ImageSettings {
  const settings: ImageSettings = {}
  const known = SETTINGS[format]
  for (const text of texts.flatMap(splitAtCommas)) {
    const [, name = text, value = 'on'] = /^([^=]*)=(.*)$/s.exec(text) ?? []
    if (name.startsWith('encrypt')) throw new BlockError('unsupported', 'Varve makes no encrypted images')
    const found = Object.hasOwn(known, name) ? known[name] : undefined
    if (found === undefined) {
      const names = Object.keys(known).join(', ')
      throw new BlockError('invalid-argument', `-o ${text}: a ${format} image has no option "${name}", only ${names}`)
    }
    if (!found.take(settings, value)) throw new BlockError('invalid-argument', `-o ${text}: ${name} is ${found.values}`)
  }
  return settings
}

function splitAtCommas(text: string): string[] {
  const pieces = text.match(/(?:,,|[^,])+/g) ?? []
  return pieces.map((piece) => piece.replaceAll(',,', ','))
}
