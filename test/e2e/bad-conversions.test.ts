// What `varve image convert`, `compare`, `diff` and `bitmap` refuse, and what they leave when they are ended early: each time there
// is one line and the right exit status, and every file is as it was.

import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import fs from 'node:fs'
import { after, before, test } from 'node:test'
import { missing, peer } from '../support/peer.ts'
import { isRefused, type Refusal } from '../support/refusals.ts'
import { beginCommand, MIB, notRoot, Site, STATUS } from '../support/site.ts'

const SKIP = { skip: missing('qemu-img', 'qemu-io', 'qemu-nbd') }
const SKIP_UNLESS_ROOT = { skip: SKIP.skip || notRoot }
const { failed, usage, notFound, busy, corrupt } = STATUS
/** A comparison that could not be made: 1 would say that the images differ. */
const UNKNOWN = 2

let site: Site

before(() => {
  site = Site.make()
  if (SKIP.skip !== false) return
  site.image('base.qcow2', '4M')
  peer('qemu-io', '-f', 'qcow2', '-c', 'write -P 1 1M 1M', site.path('base.qcow2'))
  site.image('top.qcow2', '4M', '-b', 'base.qcow2', '-F', 'qcow2')
  site.image('small.qcow2', '1M')
  fs.writeFileSync(site.path('plain.raw'), Buffer.alloc(4 * MIB, 'plain'))
  peer('qemu-img', 'bitmap', '--add', site.path('small.qcow2'), 'there')
})
after(() => site.end())

const REFUSALS: Readonly<Record<string, readonly Refusal[]>> = {
  'an image that is not there': [
    { args: 'convert @none @new.raw', status: notFound, says: /none does not exist/ },
    { args: 'convert @base.qcow2 @none/new.raw', status: notFound, says: /none\/new\.raw\.partial: open: no such/ },
    { args: 'convert -l never @base.qcow2 @new.raw', status: notFound, says: /never/ },
    { args: 'compare @none @base.qcow2', status: notFound, says: /none does not exist/ },
    { args: 'diff @base.qcow2 @none', status: notFound, says: /none does not exist/ },
    { args: 'diff --from-bitmap never @base.qcow2', status: notFound, says: /never/ },
    { args: 'bitmap --add @none one', status: notFound, says: /none does not exist/ },
    { args: 'bitmap --clear @base.qcow2 never', status: notFound, says: /never/ },
    { args: 'bitmap --merge never @small.qcow2 there', status: notFound, says: /never/ },
  ],
  'an image of another format': [
    { args: 'convert -f qcow2 @plain.raw @new.raw', status: corrupt, says: /plain\.raw is no qcow2 image/ },
    { args: 'compare -f qcow2 @plain.raw @plain.raw', status: corrupt, says: /is no qcow2 image/ },
    { args: 'diff -F qcow2 @plain.raw @plain.raw', status: corrupt, says: /is no qcow2 image/ },
    { args: 'bitmap --add @plain.raw one', status: failed, says: /a raw image, which has no bitmaps/ },
    { args: 'convert -l one -f raw @plain.raw @new.raw', status: failed, says: /has no internal snapshots/ },
  ],
  'an image that was only recognized and leads to another file': [
    { args: 'convert @top.qcow2 @new.raw', status: failed, says: /-f qcow2 follows it/ },
    { args: 'compare @base.qcow2 @top.qcow2', status: UNKNOWN, says: /-f qcow2 follows it/ },
    { args: 'diff @base.qcow2 @top.qcow2', status: failed, says: /-f qcow2 follows it/ },
  ],
  'a value or a combination that cannot be': [
    { args: 'convert @base.qcow2', status: usage, says: /name a source and a target/ },
    { args: 'convert @base.qcow2 @plain.raw', status: busy, says: /is there already: --force replaces it/ },
    { args: 'convert -O qcow2 -o cluster_size=1000 @base.qcow2 @new.qcow2', status: usage, says: /cluster size/ },
    { args: 'convert -o speed=high @base.qcow2 @new.raw', status: usage, says: /no option "speed"/ },
    { args: 'convert -S 1000 @base.qcow2 @new.raw', status: usage, says: /-S 1000: give a multiple of 512/ },
    { args: 'convert -m 17 @base.qcow2 @new.raw', status: usage, says: /-m 17: give a number from 1 to 16/ },
    { args: 'convert -c @base.qcow2 @new.raw', status: usage, says: /-c is for a target of format qcow2/ },
    { args: 'convert -c -W -O qcow2 @base.qcow2 @new.qcow2', status: usage, says: /-W cannot be combined with -c/ },
    { args: 'convert -n @base.qcow2 @small.qcow2 -O qcow2', status: usage, says: /make it larger first/ },
    { args: 'convert -n --force @base.qcow2 @plain.raw', status: usage, says: /give one of them/ },
    { args: 'convert --target-is-zero @base.qcow2 @new.raw', status: usage, says: /with -n/ },
    { args: 'convert -B base.qcow2 -O qcow2 @base.qcow2 @new.qcow2', status: usage, says: /-F raw or -F qcow2/ },
    { args: 'convert -B base.qcow2 -F qcow2 @base.qcow2 @new.raw', status: usage, says: /raw image cannot have/ },
    { args: 'convert --bitmaps @base.qcow2 @new.raw', status: usage, says: /from one qcow2 image to another one/ },
    { args: 'compare @base.qcow2', status: usage, says: /missing required argument/ },
    { args: 'diff @base.qcow2', status: usage, says: /name two images/ },
    { args: 'diff --overlay @base.qcow2 @top.qcow2', status: usage, says: /name one image/ },
    { args: 'diff -g 1000 @base.qcow2 @base.qcow2', status: usage, says: /-g 1000: give a power of two/ },
    { args: 'diff --into @small.qcow2 @base.qcow2 @base.qcow2', status: usage, says: /name the bitmap/ },
    { args: 'diff --bitmap there --into @small.qcow2 @plain.raw @plain.raw', status: busy, says: /"there" already/ },
    { args: 'diff --bitmap one --into @small.qcow2 @plain.raw @base.qcow2', status: usage, says: /past the 1048576/ },
    { args: 'bitmap @small.qcow2 there', status: usage, says: /say what to do/ },
    { args: 'bitmap --add -g 1000 @small.qcow2 one', status: usage, says: /granularity|power of two/ },
    { args: 'bitmap --add @small.qcow2 there', status: busy, says: /there/ },
    { args: 'bitmap --clear -g 64k @small.qcow2 there', status: usage, says: /-g goes with --add/ },
    { args: 'bitmap --clear -b @base.qcow2 @small.qcow2 there', status: usage, says: /--merge takes/ },
  ],
}

for (const [what, refusals] of Object.entries(REFUSALS)) {
  test(`${what} is refused`, SKIP, async () => {
    for (const refusal of refusals) await isRefused(site, refusal)
  })
}

test('an image that another process writes to is refused, by whom', SKIP, async (t) => {
  const socket = site.path('holder')
  const child = spawn('qemu-nbd', ['-t', '-f', 'qcow2', '-k', socket, site.path('base.qcow2')], { stdio: 'ignore' })
  t.after(() => {
    child.kill('SIGKILL')
    fs.rmSync(socket, { force: true })
  })
  while (!fs.existsSync(socket)) await new Promise((resolve) => setTimeout(resolve, 20))
  const says = new RegExp(`base\\.qcow2 is in use by qemu-nbd \\(pid ${child.pid}\\)`)
  const refused = [
    'convert @base.qcow2 @new.raw',
    'convert -O qcow2 -n @small.qcow2 @base.qcow2',
    'convert -O qcow2 --force @small.qcow2 @base.qcow2',
    'compare @small.qcow2 @base.qcow2',
    'diff @small.qcow2 @base.qcow2',
    'bitmap --add @base.qcow2 one',
  ]
  for (const args of refused) await isRefused(site, { args, status: busy, says })
})

test('where space runs out, nothing of the target stays', SKIP_UNLESS_ROOT, async () => {
  site.smallFileSystem(site.path('tiny'), 2)
  const says = /no space left/
  for (const options of ['', '-O qcow2 ', '-O qcow2 -S 0 '])
    await isRefused(site, { args: `convert ${options}@plain.raw @tiny/new`, status: failed, says })
})

test('a conversion that is ended by a signal leaves nothing', SKIP, async () => {
  const source = site.path('large.raw')
  fs.writeFileSync(source, '')
  for (let at = 0; at < 256; at += 16) fs.appendFileSync(source, Buffer.alloc(16 * MIB, `${at} at `))
  const command = beginCommand(['image', 'convert', '-c', '-O', 'qcow2', source, site.path('ended.qcow2')])
  while (!fs.existsSync(site.path('ended.qcow2.partial'))) await new Promise((resolve) => setTimeout(resolve, 5))
  command.child.kill('SIGINT')
  const { status, stderr } = await command.ended
  fs.rmSync(source)
  assert.equal(status, failed, stderr)
  assert.match(stderr, /ended early/)
  assert.ok(fs.readdirSync(site.folder).every((name) => !name.startsWith('ended')))
})

test('what cannot be read is an error, or with --salvage zeros, a list and status 1', SKIP, async () => {
  const packed = site.path('packed.qcow2')
  peer('qemu-img', 'convert', '-c', '-O', 'qcow2', site.path('plain.raw'), packed)
  const fd = fs.openSync(packed, 'r+')
  fs.writeSync(fd, Buffer.alloc(32, 0xff), 0, 32, 5 * 65_536)
  fs.closeSync(fd)
  const target = site.path('salvaged.raw')
  await isRefused(site, { args: 'convert @packed.qcow2 @salvaged.raw', status: corrupt, says: /compressed cluster/ })
  const { status, stderr } = await beginCommand(['image', 'convert', '--salvage', packed, target]).ended
  assert.equal(status, failed)
  assert.match(stderr, /^varve: 65536 bytes at 0 could not be read and are zeros now: .*\n$/)
  const expected = fs.readFileSync(site.path('plain.raw')).fill(0, 0, 65_536)
  assert.ok(fs.readFileSync(target).equals(expected))
})
