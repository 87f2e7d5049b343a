// The model test of the engine, as long as one likes: many lives of some thousand operations, each by its own seed.
//
//   node test/model/run-engine.ts --operations 100000 --seed 1      until there were so many
//   node test/model/run-engine.ts --operations 5000 --seed 17       one life again

import { parseArgs } from 'node:util'
import { EngineModel, type Tally } from './engine-model.ts'

/** Of one life. */
const LIFE = 5000

const { values } = parseArgs({
  options: { operations: { type: 'string', default: '100000' }, seed: { type: 'string', default: '1' } },
})
const total: Tally = new Map()
const started = performance.now()
const first = Number(values.seed)
const lives = Math.ceil(Number(values.operations) / LIFE)
let failed = 0
for (let seed = first; seed < first + lives; seed++) {
  const model = await EngineModel.create(seed)
  try {
    await model.run(LIFE)
  } catch (error) {
    failed++
    console.log(`WRONG: --operations ${LIFE} --seed ${seed}\n${error instanceof Error ? error.stack : String(error)}`)
  }
  for (const [kind, { done, refused }] of model.tally) {
    const sum = total.get(kind) ?? { done: 0, refused: 0 }
    total.set(kind, { done: sum.done + done, refused: sum.refused + refused })
  }
}
const seconds = Math.round((performance.now() - started) / 1000)
console.log(
  `${lives * LIFE} operations, seeds ${first} to ${first + lives - 1}, ${seconds} s; ${failed} lives went wrong`,
)
for (const [kind, { done, refused }] of total) console.log(`${kind}: ${done} done, ${refused} refused`)
process.exitCode = failed === 0 ? 0 : 1
