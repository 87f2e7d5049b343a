// What varve disk blockdev prints, for names that QEMU, a shell or XML would read otherwise. That a real QEMU takes it is in test/guest.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { libvirtDisk, qemuArguments, qemuObjects } from './blockdev.ts'

const at = (name: string, socket = '/run/s'): { name: string; socket: string; reconnectSeconds: number } => ({
  name,
  socket,
  reconnectSeconds: 60,
})

test('a node is named as its disk, unless QEMU would refuse the name', () => {
  const node = (name: string): unknown => qemuObjects(at(name), 'virtio-blk-pci').blockdev['node-name']
  assert.equal(node('vm1'), 'vm1')
  assert.equal(node('a'.repeat(31)), 'a'.repeat(31))
  for (const name of ['a'.repeat(32), '1st']) assert.match(String(node(name)), /^varve-[0-9a-f]{16}$/)
  assert.notEqual(node('1st'), node('2nd'))
  const { blockdev, device } = qemuObjects(at('1st'), 'virtio-blk-pci')
  assert.equal(device['drive'], blockdev['node-name'])
  assert.equal(blockdev['export'], '1st')
})

test('a path with commas and quotes goes through a shell and QEMU as it is', () => {
  const text = qemuArguments(qemuObjects(at('vm1', `/a,b/it's`), 'virtio-blk-pci'))
  assert.match(text, /^-blockdev '\{.*"path":"\/a,b\/it'\\''s".*"reconnect-delay":60/)
})

test('a path with characters of XML is escaped in libvirt’s element', () => {
  const text = libvirtDisk(at('vm1', `/a&b<'c`), 'vdb')
  assert.match(text, /socket='\/a&amp;b&lt;&apos;c'/)
  assert.match(text, /<target dev='vdb' bus='virtio'\/>/)
})
