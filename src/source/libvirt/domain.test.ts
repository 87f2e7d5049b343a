import assert from 'node:assert/strict'
import { test } from 'node:test'
import { recordedVirsh } from '../../../test/support/recorded-virsh.ts'
import { domainOf, readDomain, readSizes } from './domain.ts'

test('a machine’s disks are known by their targets, with what can be done with each', async () => {
  const { name, isRunning, hasAgent, disks } = await readDomain(recordedVirsh())
  assert.deepEqual([name, isRunning, hasAgent], ['web', true, false])
  assert.deepEqual(
    disks.map((disk) => [disk.name, disk.format, disk.file, disk.isLocal, disk.job, disk.treatment.kind]),
    [
      ['vda', 'qcow2', '/images/sys.qcow2', true, undefined, 'persistent'],
      ['vdb', 'raw', '/images/data & more.raw', true, undefined, 'compared'],
      ['vdc', 'raw', '/images/iso.raw', true, undefined, 'skipped'],
      ['hda', '', '', false, undefined, 'skipped'],
    ],
  )
  const reasons = disks.map(({ treatment }) => ('reason' in treatment ? treatment.reason : ''))
  assert.match(reasons[1] ?? '', /^raw has no place for a bitmap/)
  assert.deepEqual(reasons.slice(2), ['read-only', 'the drive is empty'])
})

test('a machine that does not run, and a block job at a disk, are seen', async () => {
  assert.equal((await readDomain(recordedVirsh('shut off'))).isRunning, false)
  const { disks } = await readDomain(recordedVirsh('a copy is at work'))
  assert.deepEqual(
    disks.map(({ job }) => job),
    [undefined, 'copy', undefined, undefined],
  )
})

test('sizes are of the disks that have a medium', async () => {
  const sizes = await readSizes(recordedVirsh())
  assert.deepEqual(
    [...sizes],
    [
      ['vda', 2 ** 25],
      ['vdb', 2 ** 24],
      ['vdc', 2 ** 20],
    ],
  )
})

test('devices of the host, network disks, floppies and transient disks are what they are', () => {
  const disk = (attributes: string, inner: string): string =>
    `<disk ${attributes}><driver name='qemu' type='raw'/>${inner}</disk>`
  const { disks, hasAgent } = domainOf(`<domain id='3'><name>x</name><devices>
    ${disk("type='block' device='lun'", "<source dev='/dev/vg/lv'/><target dev='sda'/>")}
    ${disk("type='network' device='disk'", "<source protocol='rbd' name='pool/image'/><target dev='sdb'/>")}
    ${disk("type='volume'", "<source pool='p' volume='v'/><target dev='sdc'/>")}
    ${disk("type='file' device='floppy'", "<source file='/f'/><target dev='fda'/>")}
    ${disk("type='file' device='disk'", "<source file='/t'/><target dev='sdd'/><transient/>")}
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0' state='connected'/></channel>
  </devices></domain>`)
  assert.equal(hasAgent, true)
  assert.deepEqual(
    disks.map(({ name, file, isLocal, treatment }) => [name, file, isLocal, treatment.kind]),
    [
      ['sda', '/dev/vg/lv', true, 'compared'],
      ['sdb', 'rbd pool/image', false, 'compared'],
      ['sdc', 'p v', false, 'compared'],
      ['fda', '/f', true, 'skipped'],
      ['sdd', '/t', true, 'skipped'],
    ],
  )
})
