// The chart of docs/benchmarks.md: for each workload a bar per server, as long as its speed beside qemu-nbd's, whose own is 1. A
// plain SVG with colours for a light and a dark page. It measures nothing.
//
//   raw, random read 4 KiB, depth 32   varve nbd    =================== 2.6
//                                      nbdkit file  ============= 1.8
//                                                       | 1: qemu-nbd

import { type Results, ratioTo, type Row } from './results.ts'
import { NBDKIT, QEMU_NBD, STORAGE_DAEMON, VARVE } from './servers.ts'

const SHOWN = [VARVE.name, NBDKIT.name, STORAGE_DAEMON.name]
const WIDTH = 860
/** Where the bars begin, and the width of one time qemu-nbd's speed. */
const LEFT = 250
const BAR = 14
const GAP = 16
const TOP = 56

const STYLE = `text { font: 12px system-ui, sans-serif; fill: #24292f }
.title { font-weight: 600; font-size: 14px }
.line { stroke: #8c959f; stroke-dasharray: 3 3 }
.bar0 { fill: #0b6e4f } .bar1 { fill: #8c959f } .bar2 { fill: #c9a227 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 }
  .bar0 { fill: #2fbf8f } .bar1 { fill: #768390 } .bar2 { fill: #d9b84a }
}`

export function drawChart(results: Results): string {
  const ratios = results.rows.flatMap((row) => SHOWN.map((program) => ratioTo(row, QEMU_NBD.name, program) ?? 0))
  const unit = (WIDTH - LEFT - 60) / Math.max(1, ...ratios)
  const parts: string[] = []
  let y = TOP
  for (const row of results.rows) {
    const bars = SHOWN.flatMap((program, index) => {
      const ratio = ratioTo(row, QEMU_NBD.name, program)
      return ratio === undefined ? [] : [{ index, ratio }]
    })
    const middle = y + (bars.length * BAR) / 2 + 4
    parts.push(`<text x="${LEFT - 10}" y="${middle}" text-anchor="end">${labelOf(row)}</text>`)
    for (const { index, ratio } of bars) {
      const length = (ratio * unit).toFixed(1)
      parts.push(`<rect class="bar${index}" x="${LEFT}" y="${y}" width="${length}" height="${BAR - 2}" rx="2"/>`)
      parts.push(`<text x="${(LEFT + ratio * unit + 6).toFixed(1)}" y="${y + 10}">${ratio.toFixed(2)}</text>`)
      y += BAR
    }
    y += GAP
  }
  const one = (LEFT + unit).toFixed(1)
  const legend = SHOWN.map((program, index) => {
    const x = LEFT + index * 150
    return `<rect class="bar${index}" x="${x}" y="32" width="12" height="12" rx="2"/><text x="${x + 18}" y="42">${program}</text>`
  })
  return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${WIDTH} ${y}" width="${WIDTH}" height="${y}" role="img">
<title>Speed of NBD servers beside qemu-nbd, images in the page cache</title>
<style>${STYLE}</style>
<text class="title" x="16" y="20">Speed beside qemu-nbd, which is 1 (dashed line): images in the page cache, one client, Unix socket</text>
${legend.join('\n')}
<line class="line" x1="${one}" y1="${TOP - 4}" x2="${one}" y2="${y - GAP + 4}"/>
${parts.join('\n')}
</svg>
`
}

function labelOf(row: Row): string {
  return `${row.table}, ${row.name}`
}
