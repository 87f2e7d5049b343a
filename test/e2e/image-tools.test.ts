// `varve image` as a user has it: what the commands change is what qemu-img then finds; results on standard output, exit
// statuses as the documentation says.

import assert from 'node:assert/strict'
import fs from 'node:fs'
import path from 'node:path'
import { type TestContext, test } from 'node:test'
import { missing, type Outcome, peer } from '../support/peer.ts'
import { beginCommand, STATUS } from '../support/site.ts'
import { tempFolder } from '../support/temp.ts'

const SKIP = { skip: missing('qemu-img', 'qemu-io') }
const CLUSTER = 65_536

class Images {
  readonly #folder: string
  readonly #options: readonly string[]

  /** `options` of qemu-img create -o, for every image. */
  constructor(t: TestContext, ...options: string[]) {
    this.#folder = tempFolder(t)
    this.#options = options.flatMap((option) => ['-o', option])
  }

  path(name: string): string {
    return path.join(this.#folder, name)
  }

  /** Makes a qcow2 image with qemu-img, over another one of the folder or not, and writes to it with qemu-io. */
  make(name: string, size: string, backing: string | undefined, ...commands: string[]): string {
    const image = this.path(name)
    const below = backing === undefined ? [] : ['-b', backing, '-F', 'qcow2']
    peer('qemu-img', 'create', '-q', '-f', 'qcow2', ...this.#options, ...below, image, size)
    if (commands.length > 0) peer('qemu-io', '-f', 'qcow2', ...commands.flatMap((text) => ['-c', text]), image)
    return image
  }

  /** What the disk of an image reads as. */
  content(image: string): Buffer {
    const raw = this.path('content.raw')
    peer('qemu-img', 'convert', '-f', 'qcow2', '-O', 'raw', image, raw)
    return fs.readFileSync(raw)
  }
}

function run(...args: string[]): Promise<Outcome> {
  return beginCommand(['image', ...args]).ended
}

async function done(...args: string[]): Promise<string> {
  const { status, stdout, stderr } = await run(...args)
  assert.equal(status, STATUS.done, `${args.join(' ')}: ${stderr}`)
  assert.equal(stderr, '', args.join(' '))
  return stdout
}

function infoOf(image: string): Record<string, unknown> {
  return JSON.parse(peer('qemu-img', 'info', '--output=json', image)) as Record<string, unknown>
}

function isClean(image: string): void {
  peer('qemu-img', 'check', '-q', '-f', 'qcow2', image)
}

function setBytes(image: string, offset: number, ...bytes: number[]): void {
  const descriptor = fs.openSync(image, 'r+')
  fs.writeSync(descriptor, Uint8Array.from(bytes), 0, bytes.length, offset)
  fs.closeSync(descriptor)
}

test('what is created is what was asked for', SKIP, async (t) => {
  const images = new Images(t)
  const base = images.path('base.qcow2')
  assert.match(await done('create', '-f', 'qcow2', '-o', 'cluster_size=4k', base, '10M'), /^made .*base\.qcow2/)
  assert.deepEqual([infoOf(base)['virtual-size'], infoOf(base)['cluster-size']], [10 * 1024 * 1024, 4096])
  isClean(base)
  const overlay = images.path('overlay.qcow2')
  assert.equal(await done('create', '-q', '-f', 'qcow2', '-b', 'base.qcow2', '-F', 'qcow2', overlay), '')
  assert.equal(infoOf(overlay)['virtual-size'], 10 * 1024 * 1024)
  assert.equal(infoOf(overlay)['backing-filename'], 'base.qcow2')
  const unsafe = images.path('unsafe.qcow2')
  await done('create', '-f', 'qcow2', '-u', '-b', 'to-come.qcow2', '-F', 'qcow2', unsafe, '1M')
  assert.match(peer('qemu-img', 'info', '-U', unsafe), /to-come\.qcow2/)
  const raw = images.path('disk.raw')
  await done('create', raw, '1000')
  assert.equal(fs.statSync(raw).size, 1024)
  assert.equal(fs.statSync(raw).blocks, 0)
  await done('create', '--force', '-o', 'preallocation=full', raw, '1M')
  assert.ok(fs.statSync(raw).blocks * 512 >= 1024 * 1024)
  assert.deepEqual(fs.readdirSync(path.dirname(raw)).sort(), [
    'base.qcow2',
    'disk.raw',
    'overlay.qcow2',
    'unsafe.qcow2',
  ])
})

test('an image has the features that -o names', SKIP, async (t) => {
  const images = new Images(t)
  const made: readonly (readonly [option: string, field: string, value: unknown])[] = [
    ['compat=0.10', 'compat', '0.10'],
    ['lazy_refcounts=on', 'lazy-refcounts', true],
    ['refcount_bits=1', 'refcount-bits', 1],
    ['compression_type=zstd', 'compression-type', 'zstd'],
    ['extended_l2=on', 'extended-l2', true],
    [`data_file=${images.path('data.raw')},data_file_raw=on`, 'data-file-raw', true],
  ]
  for (const [option, field, value] of made) {
    const image = images.path(`${field}.qcow2`)
    await done('create', '-f', 'qcow2', '-o', option, image, '4M')
    const specific = infoOf(image)['format-specific'] as { data: Record<string, unknown> }
    assert.equal(specific.data[field], value, option)
    isClean(image)
  }
  for (const preallocation of ['metadata', 'falloc', 'full']) {
    const image = images.path(`${preallocation}.qcow2`)
    await done('create', '-f', 'qcow2', '-o', `preallocation=${preallocation}`, image, '4M')
    assert.ok(fs.statSync(image).size > 4 * 1024 * 1024)
    await done('resize', '--preallocation', preallocation, image, '+2M')
    isClean(image)
    assert.ok(images.content(image).equals(Buffer.alloc(6 * 1024 * 1024)))
  }
})

test(
  'a check ends with 0, 1 or 5 as nothing, space or data is at stake, and repairs what it is told to',
  SKIP,
  async (t) => {
    const images = new Images(t)
    const image = images.make('image.qcow2', '4M', undefined, 'write -P 1 0 1M')
    const before = images.content(image)
    assert.match(await done('check', image), /^No errors were found/)
    assert.equal(await done('check', '-q', image), '')
    // The refcount block is the third cluster; its entries have two bytes.
    const counts = 2 * CLUSTER
    fs.truncateSync(image, 100 * CLUSTER)
    setBytes(image, counts + 99 * 2, 0, 1)
    const leaking = await run('check', '--output=json', image)
    assert.equal(leaking.status, 1)
    assert.equal((JSON.parse(leaking.stdout) as { leaks: number }).leaks, 1)
    const repaired = JSON.parse(await done('--json', 'check', '-r', 'leaks', image)) as Record<string, number>
    assert.deepEqual([repaired['leaks-fixed'], repaired['leaks'], repaired['corruptions']], [1, undefined, undefined])
    isClean(image)
    setBytes(image, counts + 8 * 2, 0, 0)
    const corrupt = await run('check', image)
    assert.equal(corrupt.status, STATUS.corrupt)
    assert.match(corrupt.stdout, /cluster 8 is used 1 times and counted 0 times/)
    assert.equal((await run('check', '-r', 'leaks', image)).status, STATUS.corrupt)
    assert.match(await done('check', '-r', 'all', image), /repaired 2 errors.*checked again:\nNo errors/)
    isClean(image)
    assert.ok(images.content(image).equals(before))
  },
)

test('a disk is made larger and smaller, to a size and by one', SKIP, async (t) => {
  const images = new Images(t)
  const image = images.make('image.qcow2', '4M', undefined, 'write -P 1 3M 1M')
  const before = images.content(image)
  await done('resize', image, '6M')
  await done('resize', '-q', image, '+2M')
  assert.ok(images.content(image).equals(Buffer.concat([before, Buffer.alloc(4 * 1024 * 1024)])))
  isClean(image)
  await done('resize', '--shrink', image, '-3M')
  assert.ok(images.content(image).equals(Buffer.concat([before, Buffer.alloc(1024 * 1024)])))
  await done('resize', '--shrink', image, '3500k')
  assert.ok(images.content(image).equals(before.subarray(0, 3500 * 1024)))
  isClean(image)
  const raw = images.path('disk.raw')
  fs.writeFileSync(raw, before)
  const said = JSON.parse(await done('resize', '--output=json', '-f', 'raw', '--shrink', raw, '-1M')) as unknown
  assert.deepEqual(said, { filename: raw, 'old-virtual-size': before.length, 'virtual-size': 3 * 1024 * 1024 })
  assert.ok(fs.readFileSync(raw).equals(before.subarray(0, 3 * 1024 * 1024)))
  await done('resize', '-f', 'raw', '--preallocation', 'falloc', raw, '+1M')
  assert.ok(
    fs
      .readFileSync(raw)
      .subarray(3 * 1024 * 1024)
      .equals(Buffer.alloc(1024 * 1024)),
  )
  assert.ok(fs.statSync(raw).blocks * 512 >= 4 * 1024 * 1024)
})

/** Kinds of images, by the options of qemu-img create -o. */
const KINDS = ['compat=1.1', 'compat=0.10', 'cluster_size=512', 'extended_l2=on', 'lazy_refcounts=on,refcount_bits=1']

for (const kind of KINDS) {
  test(`an overlay with ${kind} that is rebased reads as before`, SKIP, (t) => rebaseOverlay(new Images(t, kind)))
  test(`an overlay with ${kind} is committed to its backing file, or to one further down`, SKIP, (t) =>
    commitOverlay(new Images(t, kind)),
  )
}

/** Over another image, over none, and with a name alone. */
async function rebaseOverlay(images: Images): Promise<void> {
  images.make('old.qcow2', '4M', undefined, 'write -P 1 0 2M', 'write -P 2 3M 100k')
  images.make('new.qcow2', '3M', undefined, 'write -P 1 512k 1M', 'write -P 3 2560k 300k')
  const overlay = images.make('overlay.qcow2', '5M', 'old.qcow2', 'write -P 4 1M 10k', 'write -z 100k 200k')
  const before = images.content(overlay)
  for (const args of [
    ['-b', 'new.qcow2', '-F', 'qcow2'],
    ['-b', ''],
  ]) {
    await done('rebase', '-f', 'qcow2', ...args, overlay)
    assert.equal(infoOf(overlay)['backing-filename'], args[1] === '' ? undefined : args[1])
    assert.ok(images.content(overlay).equals(before), args.join(' '))
    isClean(overlay)
  }
  await done('rebase', '-u', '-b', 'elsewhere.qcow2', '-F', 'qcow2', overlay)
  assert.equal(infoOf(overlay)['backing-filename'], 'elsewhere.qcow2')
}

async function commitOverlay(images: Images): Promise<void> {
  const base = images.make('base.qcow2', '3M', undefined, 'write -P 1 0 2M')
  const middle = images.make('middle.qcow2', '4M', 'base.qcow2', 'write -P 2 1M 1M')
  const top = images.make('top.qcow2', '5M', 'middle.qcow2', 'write -P 3 1536k 3M', 'write -z 0 300k')
  const before = images.content(top)
  await done('commit', '-f', 'qcow2', '-d', top)
  assert.ok(images.content(middle).equals(before))
  assert.ok(fs.statSync(top).blocks * 512 > 3 * 1024 * 1024, 'with -d the overlay keeps its data')
  await done('commit', '-f', 'qcow2', top)
  assert.ok(fs.statSync(top).blocks * 512 < 1024 * 1024, 'the overlay is emptied')
  assert.ok(images.content(top).equals(before))
  await done('commit', '-f', 'qcow2', '-b', base, top)
  assert.ok(images.content(base).equals(before))
  for (const image of [base, middle, top]) isClean(image)
}

test('internal snapshots are made, listed, applied and deleted by id or name', SKIP, async (t) => {
  const images = new Images(t)
  const image = images.make('image.qcow2', '4M', undefined, 'write -P 1 0 1M')
  const before = images.content(image)
  assert.equal(await done('snapshot', '-c', 'before', image), 'made snapshot before\n')
  peer('qemu-io', '-f', 'qcow2', '-c', 'write -P 2 512k 1M', image)
  assert.equal(await done('snapshot', '-q', '-c', 'after', image), '')
  const listed = JSON.parse(await done('snapshot', '--output=json', image)) as { id: string; name: string }[]
  assert.deepEqual(
    listed.map(({ id, name }) => [id, name]),
    [
      ['1', 'before'],
      ['2', 'after'],
    ],
  )
  assert.match(await done('snapshot', '-l', image), /^ID +TAG .*\n1 +before .*\n2 +after /)
  await done('snapshot', '-a', 'before', image)
  assert.ok(images.content(image).equals(before))
  await done('snapshot', '-d', '2', image)
  isClean(image)
  assert.match(peer('qemu-img', 'snapshot', '-l', image), /before/)
  assert.doesNotMatch(peer('qemu-img', 'snapshot', '-l', image), /after/)
  assert.equal((await run('snapshot', '-a', 'after', image)).status, STATUS.notFound)
  assert.equal((await run('snapshot', '-l', '-d', '1', image)).status, STATUS.usage)
  const raw = images.path('disk.raw')
  fs.writeFileSync(raw, Buffer.alloc(4096))
  assert.equal((await run('snapshot', '-c', 'x', '-f', 'raw', raw)).status, STATUS.failed)
})
