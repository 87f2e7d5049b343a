// What `varve image` refuses: missing files, wrong formats, images in use, values that cannot be, full and read-only places. Each time
// there is one line and the right exit status, and every file is as it was.

import assert from 'node:assert/strict'
import { type ChildProcess, spawn } from 'node:child_process'
import fs from 'node:fs'
import path from 'node:path'
import { after, before, type TestContext, test } from 'node:test'
import { missing, peer } from '../support/peer.ts'
import { isRefused as isRefusedOn, type Refusal } from '../support/refusals.ts'
import { beginCommand, checkRefusal, notRoot, Site, STATUS } from '../support/site.ts'

const SKIP = { skip: missing('qemu-img', 'qemu-io', 'qemu-nbd') }
const SKIP_UNLESS_ROOT = { skip: SKIP.skip || notRoot }
const { failed, usage, notFound, busy, corrupt } = STATUS
const NOBODY = 65_534

let site: Site

before(() => {
  site = Site.make()
  if (SKIP.skip !== false) return
  site.image('base.qcow2', '4M')
  peer('qemu-io', '-f', 'qcow2', '-c', 'write -P 1 1M 1M', site.path('base.qcow2'))
  overlay('top.qcow2', 'base.qcow2')
  site.image('plain.raw', '4M')
  fs.mkdirSync(site.path('elsewhere'))
  site.image('elsewhere/far.qcow2', '4M')
  overlay('lower.qcow2', 'elsewhere/far.qcow2')
  fs.writeFileSync(site.path('other.vmdk'), 'KDMV'.padEnd(65_536, '\0'))
  fs.mkdirSync(site.path('folder'))
})
after(() => site.end())

function overlay(name: string, backing: string, ...options: string[]): string {
  return site.image(name, '4M', '-b', backing, '-F', 'qcow2', ...options)
}

/** As `isRefused` of the helpers, on this site. */
function isRefused(refusal: Refusal, options: { readonly user?: number } = {}): Promise<void> {
  return isRefusedOn(site, refusal, options)
}

const MISSING: readonly Refusal[] = [
  'info @none',
  'map @none',
  'check @none',
  'check -f qcow2 -r all @none',
  'measure @none',
  'resize @none 1G',
  'rebase -b base.qcow2 -F qcow2 @none',
  'commit @none',
].map((args) => ({ args, status: notFound, says: /none does not exist/ }))

const REFUSALS: Readonly<Record<string, readonly Refusal[]>> = {
  'an image that is not there': [
    ...MISSING,
    { args: 'create -f qcow2 -b none -F qcow2 @new.qcow2', status: notFound, says: /none does not exist/ },
    { args: 'create @none/new.raw 1M', status: notFound, says: /none\/new\.raw: open: no such file/ },
    { args: 'rebase -f qcow2 -b none -F qcow2 @top.qcow2', status: notFound, says: /none does not exist/ },
    { args: 'commit -f qcow2 -b @none @top.qcow2', status: notFound, says: /none/ },
  ],
  'an image of another format': [
    ...['info', 'map', 'check', 'measure', 'commit'].map((tool) => ({
      args: `${tool} -f qcow2 @plain.raw`,
      status: corrupt,
      says: /plain\.raw is no qcow2 image/,
    })),
    { args: 'resize -f qcow2 @plain.raw +1M', status: corrupt, says: /is no qcow2 image/ },
    { args: "rebase -f qcow2 -b '' @plain.raw", status: corrupt, says: /is no qcow2 image/ },
    { args: 'create -f qcow2 -b plain.raw -F qcow2 @new.qcow2', status: corrupt, says: /is no qcow2 image/ },
    { args: 'info @other.vmdk', status: failed, says: /looks like a vmdk image/ },
    { args: 'resize @other.vmdk 1G', status: failed, says: /looks like a vmdk image.*-f raw/ },
    { args: 'check @plain.raw', status: failed, says: /raw image, which has nothing to check/ },
    { args: 'rebase -u -b base.qcow2 -F qcow2 @plain.raw', status: failed, says: /cannot have a backing file/ },
    { args: 'commit @plain.raw', status: usage, says: /has no backing file to commit to/ },
    { args: 'commit -f qcow2 @base.qcow2', status: usage, says: /has no backing file to commit to/ },
    { args: 'info @folder', status: usage, says: /neither a file nor a block device/ },
  ],
  'a backing file that nobody vouched for': [
    ...['map', 'measure', 'commit'].map((tool) => ({
      args: `${tool} @top.qcow2`,
      status: failed,
      says: /names the backing file base\.qcow2.*-f qcow2 follows it/,
    })),
    { args: 'info --backing-chain @top.qcow2', status: failed, says: /-f qcow2 follows it/ },
    { args: 'resize @top.qcow2 +1M', status: failed, says: /-f qcow2 follows it/ },
    { args: "rebase -b '' @top.qcow2", status: failed, says: /-f qcow2 follows it/ },
  ],
  'values that cannot be': [
    { args: 'info', status: usage, says: /missing required argument/ },
    { args: 'info @base.qcow2 more', status: usage, says: /too many arguments/ },
    { args: 'info --unknown @base.qcow2', status: usage, says: /unknown option/ },
    { args: 'info -f vmdk @base.qcow2', status: usage, says: /Allowed choices are raw, qcow2/ },
    { args: 'info --output=xml @base.qcow2', status: usage, says: /Allowed choices are human, json/ },
    { args: 'map --start-offset much @base.qcow2', status: usage, says: /"much" is not a size/ },
    { args: 'map --start-offset 5M @base.qcow2', status: usage, says: /has 4194304 bytes/ },
    { args: 'create @new.raw', status: usage, says: /say how large/ },
    { args: 'create @new.raw many', status: usage, says: /"many" is not a size/ },
    { args: 'create -f qcow2 -o cluster_size=3k @new.qcow2 1M', status: usage, says: /power of two/ },
    { args: 'create -f qcow2 -o cluster_size=big @new.qcow2 1M', status: usage, says: /cluster_size is a size/ },
    { args: 'create -f qcow2 -o colour=blue @new.qcow2 1M', status: usage, says: /no option "colour".*cluster_size/ },
    { args: 'create -f qcow2 -o encryption=on @new.qcow2 1M', status: failed, says: /no encrypted images/ },
    { args: 'create -o cluster_size=64k @new.raw 1M', status: usage, says: /a raw image has no option/ },
    { args: 'create -f qcow2 -o preallocation=some @new.qcow2 1M', status: usage, says: /off, metadata, falloc, full/ },
    { args: 'create -f qcow2 -b base.qcow2 @new.qcow2', status: usage, says: /-F raw or -F qcow2/ },
    { args: 'create -f qcow2 -F qcow2 @new.qcow2 1M', status: usage, says: /without a backing file/ },
    { args: 'create -b base.qcow2 -F qcow2 @new.raw', status: usage, says: /raw image cannot have a backing file/ },
    { args: 'create -f qcow2 -u -b none -F qcow2 @new.qcow2', status: usage, says: /say how large/ },
    { args: 'create @plain.raw 1M', status: busy, says: /is there already: --force replaces it/ },
    { args: 'create --force @folder 1M', status: usage, says: /only a file can be replaced/ },
    { args: 'measure', status: usage, says: /either an image or --size/ },
    { args: 'measure --size 1G @base.qcow2', status: usage, says: /either an image or --size/ },
    { args: 'measure --size 1G -O qcow2 -o refcount_bits=many', status: usage, says: /refcount_bits is/ },
    { args: 'resize @plain.raw little', status: usage, says: /"little" is not a size/ },
    { args: 'resize @plain.raw --little', status: usage, says: /"--little" is not a size/ },
    { args: 'resize -f raw @plain.raw -1M', status: usage, says: /--shrink says that this is meant/ },
    { args: 'resize -f raw --shrink @plain.raw -1G', status: usage, says: /less than is to be taken away/ },
    { args: 'resize -f raw --preallocation=metadata @plain.raw +1M', status: usage, says: /no metadata/ },
    { args: 'check -r some @base.qcow2', status: usage, says: /Allowed choices are leaks, all/ },
    { args: 'check -U -r all @base.qcow2', status: usage, says: /leave out -U/ },
    { args: 'rebase -f qcow2 @top.qcow2', status: usage, says: /required option/ },
    { args: 'rebase -f qcow2 -b base.qcow2 @top.qcow2', status: usage, says: /-F raw or -F qcow2/ },
    {
      args: 'rebase -f qcow2 -b top.qcow2 -F qcow2 @top.qcow2',
      status: usage,
      says: /the image itself or based on it/,
    },
    {
      args: 'rebase -f qcow2 -b top.qcow2 -F qcow2 @base.qcow2',
      status: usage,
      says: /the image itself or based on it/,
    },
    { args: 'commit -f qcow2 -b @plain.raw @top.qcow2', status: usage, says: /is no backing file of/ },
  ],
}

for (const [what, refusals] of Object.entries(REFUSALS)) {
  test(`${what} is refused`, SKIP, async () => {
    for (const refusal of refusals) await isRefused(refusal)
  })
}

test('a backing file in another folder is opened only where that is allowed', SKIP, async (t) => {
  const other = fs.mkdtempSync(`${site.folder}-other-`)
  t.after(() => fs.rmSync(other, { recursive: true, force: true }))
  const far = path.join(other, 'far.qcow2')
  peer('qemu-img', 'create', '-q', '-f', 'qcow2', far, '4M')
  const image = overlay('reaching-out.qcow2', far)
  await isRefused({ args: `map -f qcow2 ${image}`, status: failed, says: /outside the allowed folders/ })
  const { status, stderr } = await beginCommand(['image', 'map', '-f', 'qcow2', '--allow', other, image]).ended
  assert.equal(status, STATUS.done, stderr)
})

/** Has a program of QEMU's hold the image; resolves when it does. */
async function hold(t: TestContext, image: string): Promise<ChildProcess> {
  const socket = site.path('holder')
  const child = spawn('qemu-nbd', ['-t', '-f', 'qcow2', '-k', socket, image], { stdio: 'ignore' })
  t.after(() => {
    child.kill('SIGKILL')
    fs.rmSync(socket, { force: true })
  })
  while (!fs.existsSync(socket)) await new Promise((resolve) => setTimeout(resolve, 20))
  return child
}

test(
  'an image that another process writes to is refused, by whom, and can be looked at all the same',
  SKIP,
  async (t) => {
    const { pid } = await hold(t, site.path('base.qcow2'))
    const says = new RegExp(`base\\.qcow2 is in use by qemu-nbd \\(pid ${pid}\\)`)
    const refused = [
      'info @base.qcow2',
      'map @base.qcow2',
      'check @base.qcow2',
      'measure @base.qcow2',
      'resize @base.qcow2 +1M',
      "rebase -b '' @base.qcow2",
      'commit -f qcow2 @top.qcow2',
      'map -f qcow2 @top.qcow2',
      'create --force @base.qcow2 1M',
      'create -f qcow2 -b base.qcow2 -F qcow2 @new.qcow2',
      'rebase -f qcow2 -b base.qcow2 -F qcow2 @lower.qcow2',
    ]
    for (const args of refused) await isRefused({ args, status: busy, says })
    for (const args of ['info -U', 'map -U', 'check -U', 'measure -U', 'map -U -f qcow2']) {
      const image = site.path(args.endsWith('qcow2') ? 'top.qcow2' : 'base.qcow2')
      const { status, stderr } = await beginCommand(['image', ...args.split(' '), image]).ended
      assert.equal(status, STATUS.done, `${args}: ${stderr}`)
    }
  },
)

test('an image that may not be written is refused where it would be', SKIP_UNLESS_ROOT, async () => {
  fs.chmodSync(site.folder, 0o755)
  for (const name of ['base.qcow2', 'top.qcow2', 'plain.raw']) fs.chmodSync(site.path(name), 0o644)
  const says = /may not be written by this user|permission denied/
  const refused = [
    'check -r leaks @base.qcow2',
    'resize @plain.raw +1M',
    'resize -f qcow2 @base.qcow2 +1M',
    "rebase -f qcow2 -b '' @top.qcow2",
    'rebase -u -b other.qcow2 -F qcow2 @top.qcow2',
    'commit -f qcow2 @top.qcow2',
    'create @new.raw 1M',
    'create --force @plain.raw 1M',
  ]
  for (const args of refused) await isRefused({ args, status: failed, says }, { user: NOBODY })
})

test('where space runs out nothing half made stays, and the disk reads as before', SKIP_UNLESS_ROOT, async () => {
  site.smallFileSystem(site.path('small'), 3)
  const says = /no space left/
  site.image('small/plain.raw', '1M')
  await isRefused({ args: 'create -o preallocation=full @small/new.raw 8M', status: failed, says })
  await isRefused({ args: 'create -o preallocation=falloc @small/new.raw 8M', status: failed, says })
  await isRefused({ args: 'resize -f raw --preallocation=full @small/plain.raw 8M', status: failed, says })

  const { folder } = site
  peer('qemu-io', '-f', 'qcow2', '-c', 'write -P 5 0 4M', site.image('data.qcow2', '4M'))
  const small = overlay('small/top.qcow2', site.path('data.qcow2'))
  await failsAndReadsAsBefore(small, ['rebase', '-f', 'qcow2', '--allow', folder, '-b', '', small])
  fs.rmSync(small)

  const base = site.image('small/base.qcow2', '4M')
  const large = overlay('large.qcow2', base)
  peer('qemu-io', '-f', 'qcow2', '-c', 'write -P 6 0 4M', large)
  await failsAndReadsAsBefore(large, ['commit', '-f', 'qcow2', '--allow', folder, large])
  peer('qemu-img', 'check', '-q', '-f', 'qcow2', base)
})

/** The command runs out of space; the disk of the image, read by another program, is what it was, and the image is clean. */
async function failsAndReadsAsBefore(image: string, args: readonly string[]): Promise<void> {
  const before = site.path('before.raw')
  peer('qemu-img', 'convert', '-f', 'qcow2', '-O', 'raw', image, before)
  checkRefusal(args, await beginCommand(['image', ...args]).ended, failed, /no space left/)
  peer('qemu-img', 'compare', '-q', '-f', 'qcow2', '-F', 'raw', image, before)
  peer('qemu-img', 'check', '-q', '-f', 'qcow2', image)
}
