// Internal snapshots outlive the process and the host: a snapshot is made, applied or deleted on a simulated host that dies at
// every operation in turn. What is there afterwards is the state before or the one after, in the disk and in every snapshot;
// the image has no corruption, and no leak once Varve opened it.

import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { Random, seedOfRun } from '../../src/base/random.ts'
import { roundDown } from '../../src/base/round.ts'
import type { BlockDevice } from '../../src/block/device.ts'
import { isBlockError } from '../../src/block/error.ts'
import { createQcow2 } from '../../src/format/qcow2/create.ts'
import { openQcow2, type Qcow2Image } from '../../src/format/qcow2/image.ts'
import { repairQcow2 } from '../../src/format/qcow2/repair.ts'
import { SimulatedHost } from '../../src/host/simulated.ts'

const PATH = '/disk'

/** What an image shows: of the disk under '', of each snapshot under its id. */
type State = ReadonlyMap<string, Buffer>

async function contentOf(device: BlockDevice): Promise<Buffer> {
  const bytes = Buffer.alloc(device.size)
  await device.read(0, bytes.length, bytes, 0)
  return bytes
}

async function stateOf(image: Qcow2Image): Promise<State> {
  const state = new Map([['', await contentOf(image)]])
  for (const { id } of image.snapshots) {
    const view = await image.openSnapshot(id)
    state.set(id, await contentOf(view))
    await view.close()
  }
  return state
}

function isEqual(a: State, b: State): boolean {
  return a.size === b.size && [...a].every(([id, bytes]) => b.get(id)?.equals(bytes) === true)
}

async function open(host: SimulatedHost): Promise<Qcow2Image> {
  const image = await openQcow2(host, PATH, { name: 'disk' })
  await image.setAccess('write')
  return image
}

async function churn(image: Qcow2Image, random: Random, count: number): Promise<void> {
  for (let i = 0; i < count; i++) {
    const offset = roundDown(random.below(image.size), 512)
    const length = Math.min(image.size - offset, 512 * random.between(1, 60))
    await image.write(offset, length, random.fill(new Uint8Array(length)), 0, 0)
  }
}

interface Setting {
  readonly version: 2 | 3
  readonly clusterSize: number
}

/** A host with an image that has two snapshots, which share some of their clusters with the disk and each other. */
async function prepared({ version, clusterSize }: Setting, random: Random): Promise<SimulatedHost> {
  const host = new SimulatedHost()
  await createQcow2(host, PATH, { size: clusterSize * 40 + 512, clusterSize, version })
  const image = await open(host)
  await churn(image, random, 12)
  await image.createSnapshot('first')
  await churn(image, random, 4)
  await image.createSnapshot('second')
  await churn(image, random, 4)
  await image.close()
  return host
}

type Step = (image: Qcow2Image) => Promise<unknown>

const WORK: Readonly<Record<string, readonly Step[]>> = {
  'making a snapshot': [(image) => image.createSnapshot('third')],
  'applying a snapshot': [(image) => image.applySnapshot('first')],
  'deleting a snapshot': [(image) => image.deleteSnapshot('first')],
  'deleting both': [(image) => image.deleteSnapshot('first'), (image) => image.deleteSnapshot('second')],
}

async function workOn(image: Qcow2Image, steps: readonly Step[], after?: () => Promise<unknown>): Promise<void> {
  for (const step of steps) {
    await step(image)
    await after?.()
  }
}

/** The states before, between and after the steps. */
async function statesOf(host: SimulatedHost, steps: readonly Step[]): Promise<State[]> {
  const image = await open(host)
  const states = [await stateOf(image)]
  await workOn(image, steps, async () => states.push(await stateOf(image)))
  await image.close()
  return states
}

interface Judged {
  readonly host: SimulatedHost
  readonly image: Qcow2Image
  readonly states: readonly State[]
  /** True where leaks, and flags that are wrong to the safe side, may be left: of version 2, which has no dirty bit. */
  readonly mayLeak: boolean
  readonly note: string
}

/** Looks at the image, goes on writing to it, and closes it. */
async function judge({ host, image, states, mayLeak, note }: Judged): Promise<void> {
  const now = await stateOf(image)
  assert.ok(
    states.some((state) => isEqual(state, now)),
    `${note}: a state that never was`,
  )
  if (!mayLeak) await isClean(image, note)
  // What is written now must leave the snapshots alone: no entry is marked as copied that is shared.
  await churn(image, new Random(1), 6)
  const after = await stateOf(image)
  for (const [id, bytes] of now)
    if (id !== '') assert.ok(after.get(id)?.equals(bytes), `${note}: snapshot ${id} changed`)
  await image.close()
  if (mayLeak) await repairQcow2(host, PATH, 'all')
  const closed = await openQcow2(host, PATH, { name: 'disk' })
  await isClean(closed, `${note}, closed`)
  assert.ok(isEqual(await stateOf(closed), after), `${note}, closed: another state`)
  await closed.close()
}

async function isClean(image: Qcow2Image, note: string): Promise<void> {
  const { corruptions, leaks, problems } = await image.check()
  assert.deepEqual([corruptions, leaks], [0, 0], `${note}: ${problems.join('\n')}`)
}

const SETTINGS: readonly Setting[] = [
  { version: 3, clusterSize: 512 },
  { version: 3, clusterSize: 4096 },
  { version: 2, clusterSize: 4096 },
]

suite('internal snapshots outlive the process and the host', () => {
  const seed = seedOfRun()
  for (const setting of SETTINGS) {
    const { version, clusterSize } = setting
    for (const [what, steps] of Object.entries(WORK)) {
      test(`${what}, a death at every operation: version ${version}, clusters of ${clusterSize}`, async (t) => {
        t.diagnostic(`VARVE_SEED=${seed}`)
        const random = new Random(seed + clusterSize)
        const before = await prepared(setting, random)
        const states = await statesOf(before.clone(), steps)
        let deaths = 0
        for (let isDead = true; isDead; deaths++) {
          for (const keep of ['killed', 'none', 'all', random] as const) {
            const host = before.clone()
            const image = await open(host)
            // What the guest wrote last is lost or kept with the rest; it must not matter to the snapshots.
            const last = host.operations + 1 + deaths
            isDead = false
            host.beforeOperation = ({ number }) => {
              if (number !== last) return
              isDead = true
              if (keep === 'killed') host.killProcess()
              else host.crash(keep)
            }
            try {
              await workOn(image, steps)
            } catch (error) {
              if (!isBlockError(error, 'closed')) throw error
            }
            host.beforeOperation = undefined
            if (!isDead) {
              await judge({ host, image, states: states.slice(-1), mayLeak: false, note: `seed ${seed}, alive` })
              break
            }
            const how = typeof keep === 'string' ? keep : 'some kept'
            const note = `seed ${seed}, operation ${deaths}, ${how}`
            await judge({ host, image: await open(host), states, mayLeak: version === 2, note })
          }
        }
        assert.ok(deaths > 10, `${deaths} operations`)
        t.diagnostic(`${deaths} operations, each with 4 deaths`)
      })
    }
  }
})
