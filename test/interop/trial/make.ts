// Makes the image of a trial, by QEMU or by Varve, with its first content and with the images below it: raw and qcow2, longer
// and shorter than it, of other versions and cluster sizes, by both programs.

import fs from 'node:fs'
import path from 'node:path'
import type { Random } from '../../../src/base/random.ts'
import { createQcow2 } from '../../../src/format/qcow2/create.ts'
import { realHost } from '../../../src/host/real.ts'
import { peer } from '../../support/peer.ts'
import { type Combination, createOptions } from '../matrix.ts'
import { qemuIo, writePattern } from './qemu-turn.ts'
import { paintPattern, paintSome, SECTOR, someRange, type Trial } from './state.ts'
import { changeTogether, packSome, withImage } from './varve-turn.ts'

const KIB = 1024
const MIB = 1024 * KIB
const WRITES_BELOW = 6
const COMPRESSED_MOST = 60

/** Bytes of the disk by cluster size, about: several L2 tables of small clusters, several of the large clusters. */
const SIZES = new Map([
  [512, 300 * KIB],
  [4 * KIB, 2560 * KIB],
  [16 * KIB, 3 * MIB],
  [64 * KIB, 5 * MIB],
  [2 * MIB, 14 * MIB],
])

interface Below {
  readonly name: string
  readonly format: 'raw' | 'qcow2'
  readonly content: Buffer
}

export async function makeImage(trial: Trial): Promise<void> {
  const { combination, random } = trial
  const size = someSize(random, combination)
  const below = await makeBelow(trial, size)
  trial.model = Buffer.alloc(size)
  below?.content.copy(trial.model)
  trial.backingSize = below?.content.length ?? 0
  if (random.chance(0.5)) await makeByVarve(trial, below)
  else makeByQemu(trial, below)
}

async function makeByVarve(trial: Trial, below: Below | undefined): Promise<void> {
  const { combination, model, image, history } = trial
  history.push('made by Varve')
  await createQcow2(realHost, image, {
    size: model.length,
    version: combination.version === '0.10' ? 2 : 3,
    clusterSize: combination.clusterSize,
    refcountBits: combination.refcountBits,
    compression: combination.compression === 'zstd' ? 'zstd' : 'zlib',
    lazyRefcounts: combination.lazyRefcounts,
    extendedL2: combination.extendedL2,
    ...(combination.dataFile === 'none' ? {} : { dataFile: trial.dataFile }),
    dataFileRaw: combination.dataFile === 'raw',
    ...(below === undefined ? {} : { backing: { name: below.name, format: below.format } }),
  })
  if (combination.compression !== 'none') await withImage(image, (opened) => packSome(trial, opened))
}

function makeByQemu(trial: Trial, below: Below | undefined): void {
  const { combination, model, image, history } = trial
  const isCompressed = combination.compression !== 'none'
  if (isCompressed && below === undefined) return convertCompressed(trial)
  history.push('made by qemu-img create')
  const backing = below === undefined ? [] : ['-b', below.name, '-F', below.format]
  const options = createOptions(combination, trial.dataFile)
  peer('qemu-img', 'create', '-q', '-f', 'qcow2', '-o', options, ...backing, image, String(model.length))
  if (isCompressed) writeCompressed(trial)
}

function someSize(random: Random, { clusterSize }: Combination): number {
  const size = SIZES.get(clusterSize) as number
  return size - SECTOR * random.pick([0, 1, 9, random.below(size / 1024)])
}

function convertCompressed(trial: Trial): void {
  trial.history.push('made by qemu-img convert -c')
  paintSome(trial.random, trial.model, trial.combination.clusterSize)
  const source = path.join(trial.folder, 'source.raw')
  fs.writeFileSync(source, trial.model)
  const options = createOptions(trial.combination, trial.dataFile)
  peer('qemu-img', 'convert', '-c', '-f', 'raw', '-O', 'qcow2', '-o', options, source, trial.image)
}

/** Some compressed clusters over what is below. */
function writeCompressed(trial: Trial): void {
  const { clusterSize } = trial.combination
  const script: string[] = []
  for (let offset = 0; offset < trial.model.length && script.length < COMPRESSED_MOST; offset += clusterSize) {
    if (!trial.random.chance(0.3)) continue
    script.push(writePattern(trial, { offset, length: Math.min(clusterSize, trial.model.length - offset) }, '-c '))
  }
  qemuIo(trial.image, script)
}

async function makeBelow(trial: Trial, size: number): Promise<Below | undefined> {
  const { random, combination } = trial
  let below: Below | undefined
  for (let index = 0; index < combination.depth; index++) {
    const more = SECTOR * random.pick([0, -1, 1]) * random.below(size / 1536)
    const content = Buffer.alloc(size + more)
    below?.content.copy(content)
    const name = `below${index}`
    below = below === undefined ? makeBase(trial, name, content) : await makeOverlay(trial, name, content, below)
    trial.history.push(`${name}: ${below.format}, ${content.length} bytes`)
  }
  return below
}

function makeBase({ random, folder, combination }: Trial, name: string, content: Buffer): Below {
  const format = random.pick(['raw', 'qcow2'] as const)
  paintSome(random, content, combination.clusterSize)
  const source = path.join(folder, format === 'raw' ? name : 'source.raw')
  fs.writeFileSync(source, content)
  if (format === 'raw') return { name, format, content }
  const packing = random.chance(0.3) ? ['-c'] : []
  const options = `cluster_size=${random.pick([SECTOR, 4 * KIB, 64 * KIB])},compat=${random.pick(['0.10', '1.1'])}`
  peer('qemu-img', 'convert', ...packing, '-f', 'raw', '-O', 'qcow2', '-o', options, source, path.join(folder, name))
  return { name, format, content }
}

async function makeOverlay(trial: Trial, name: string, content: Buffer, below: Below): Promise<Below> {
  const { random } = trial
  const file = path.join(trial.folder, name)
  const clusterSize = random.pick([SECTOR, 4 * KIB, 64 * KIB])
  const size = content.length
  if (random.chance(0.5)) {
    const options = `cluster_size=${clusterSize},compat=${random.pick(['0.10', '1.1'])}`
    const backing = ['-b', below.name, '-F', below.format]
    peer('qemu-img', 'create', '-q', '-f', 'qcow2', '-o', options, ...backing, file, String(size))
    const script = Array.from({ length: WRITES_BELOW }, () => {
      const range = someRange(random, size, clusterSize)
      return `write -P ${paintPattern(random, content, range)} ${range.offset} ${range.length}`
    })
    qemuIo(file, script)
  } else {
    await createQcow2(realHost, file, { size, clusterSize, backing: { name: below.name, format: below.format } })
    await withImage(file, async (image) => {
      await image.setAccess('write')
      for (let i = 0; i < WRITES_BELOW / 2; i++) await changeTogether({ ...trial, model: content }, image)
    })
  }
  return { name, format: 'qcow2', content }
}
