import { test } from 'node:test'
import { seedOfRun } from '../../src/base/random.ts'
import { EngineModel } from './engine-model.ts'

const OPERATIONS = 5000

test('disks and snapshots are what they must be through every command, in the order of a seeded scheduler', async (t) => {
  const seed = seedOfRun()
  t.diagnostic(`VARVE_SEED=${seed}`)
  const model = await EngineModel.create(seed)
  await model.run(OPERATIONS)
})
