#!/usr/bin/env node
// The `varve` command. Plain JavaScript that an old Node reads too, so that it can say in one line which Node it needs.
// All else is in the built package, dist/main.js.

const NEEDED = [24, 15]
const found = process.versions.node.split('.').map(Number)

if (found[0] > NEEDED[0] || (found[0] === NEEDED[0] && found[1] >= NEEDED[1])) {
  import('../dist/main.js').catch((error) => {
    console.error(error)
    process.exitCode = 1
  })
} else {
  console.error(
    `varve needs Node ${NEEDED.join('.')} or newer; this is Node ${process.versions.node} (${process.execPath})`,
  )
  process.exitCode = 1
}
