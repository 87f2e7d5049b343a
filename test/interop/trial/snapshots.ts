// Internal snapshots in a trial: made, applied and deleted by both programs in their turns, and kept intact by everything
// else. What each holds is remembered by name.

import assert from 'node:assert/strict'
import fs from 'node:fs'
import path from 'node:path'
import type { Qcow2Image } from '../../../src/format/qcow2/image.ts'
import { peer } from '../../support/peer.ts'
import { assertSame, resized, type Trial } from './state.ts'

/** Snapshots of one image at a time. */
const MOST = 3

/** How a program does it. */
interface Program {
  readonly name: string
  readonly create: (snapshot: string) => Promise<unknown> | void
  readonly apply: (snapshot: string) => Promise<void> | void
  readonly delete: (snapshot: string) => Promise<void> | void
}

function byQemu({ image }: Trial): Program {
  const run = (flag: string, name: string): void => void peer('qemu-img', 'snapshot', flag, name, image)
  return {
    name: 'qemu-img',
    create: (name) => run('-c', name),
    apply: (name) => run('-a', name),
    delete: (name) => run('-d', name),
  }
}

function byVarve(image: Qcow2Image): Program {
  return {
    name: 'Varve',
    create: (name) => image.createSnapshot(name),
    apply: (name) => image.applySnapshot(name),
    delete: (name) => image.deleteSnapshot(name),
  }
}

/** Now and then makes, applies or deletes one; by Varve where `image` is given, open to be written. */
export async function changeSnapshots(trial: Trial, image?: Qcow2Image): Promise<void> {
  const { random, snapshots, history } = trial
  if (!canHaveSnapshots(trial) || !random.chance(0.3)) return
  const program = image === undefined ? byQemu(trial) : byVarve(image)
  const isMade = snapshots.size === 0 || (snapshots.size < MOST && random.chance(0.4))
  const name = isMade ? `s${history.length}` : random.pick([...snapshots.keys()])
  if (isMade) {
    history.push(`${program.name}: creates snapshot ${name}`)
    await program.create(name)
    snapshots.set(name, Buffer.from(trial.model))
  } else if (random.chance(0.5)) {
    history.push(`${program.name}: applies snapshot ${name}`)
    await program.apply(name)
    trial.model = Buffer.from(snapshots.get(name) as Buffer)
  } else {
    history.push(`${program.name}: deletes snapshot ${name}`)
    await program.delete(name)
    snapshots.delete(name)
  }
}

function canHaveSnapshots({ combination }: Trial): boolean {
  const { refcountBits, compression, dataFile } = combination
  // Many compressed clusters share a host cluster: a narrow refcount cannot count them several times.
  return dataFile === 'none' && (refcountBits >= 16 || (refcountBits >= 4 && compression === 'none'))
}

/** Both programs read in each snapshot what the disk held. */
export async function assertSnapshots(trial: Trial, image: Qcow2Image): Promise<void> {
  const names = image.snapshots.map(({ name }) => name)
  assert.deepEqual(new Set(names), new Set(trial.snapshots.keys()), 'the names of the snapshots')
  for (const [name, expected] of trial.snapshots) {
    const view = await image.openSnapshot(name)
    const found = Buffer.alloc(view.size)
    await view.read(0, found.length, found, 0)
    await view.close()
    assertSame(found, expected, `Varve reads snapshot ${name}`)
    const past = path.join(trial.folder, 'past.raw')
    peer('qemu-img', 'convert', '-l', `snapshot.name=${name}`, '-f', 'qcow2', '-O', 'raw', trial.image, past)
    // QEMU shows as much of it as the disk is large now.
    const shown = resized(fs.readFileSync(past), Math.min(expected.length, trial.model.length))
    assertSame(shown, expected.subarray(0, shown.length), `QEMU reads snapshot ${name}`)
  }
}
