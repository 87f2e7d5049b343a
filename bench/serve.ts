// Runs `varve nbd` for the benchmark, in a process of its own: node bench/serve.ts IMAGE FORMAT SOCKET

import { serveImage } from '../src/cli/nbd.ts'

const [image, format, socket] = process.argv.slice(2)
if (image === undefined || format === undefined || socket === undefined) {
  console.error('usage: node bench/serve.ts IMAGE FORMAT SOCKET')
  process.exit(2)
}
await serveImage({ image, format, socket })
