// What the hot path of `varve nbd` consists of, at depth 32 on images in memory: system calls per request, by strace, and the time
// of each function, by V8's profiler. Prints both as tables for docs/internals/nbd-hot-path.md. Run by hand:
//
//   node bench/hot-path.ts      needs fio and strace

import { spawn } from 'node:child_process'
import fs from 'node:fs'
import path from 'node:path'
import { build } from '../tools/build.ts'
import { measure, RANDOM_READ, RANDOM_WRITE, type Load } from './fio.ts'
import { type ImageFormat, makeImage } from './images.ts'
import { FOLDER, ROOT } from './machine.ts'
import { startServer, VARVE } from './servers.ts'

const SECONDS = 3
const IMAGE_MIB = 512
const FUNCTIONS = 12
/** Where the functions are that see every request. */
const REQUEST = 'src/nbd/transmission'

interface Profile {
  readonly nodes: readonly { readonly id: number; readonly callFrame: { functionName: string; url: string } }[]
  readonly samples: readonly number[]
}

/** The share of each function in the time in which the process did something, largest first. */
function sharesOf(profile: Profile): [name: string, share: number][] {
  const names = new Map<number, string>()
  for (const { id, callFrame } of profile.nodes) {
    const { functionName, url } = callFrame
    names.set(id, `${functionName || '(anonymous)'}${url === '' ? '' : ` ${url.replace(/^.*\/(src|node:)/, '$1')}`}`)
  }
  const counts = new Map<string, number>()
  let all = 0
  // From the first request to the last: the start of the process and its end are something else.
  const isRequest = (id: number): boolean => names.get(id)?.includes(REQUEST) === true
  const during = profile.samples.slice(profile.samples.findIndex(isRequest), profile.samples.findLastIndex(isRequest))
  for (const id of during) {
    const name = names.get(id) ?? '?'
    if (name === '(idle)') continue
    all++
    counts.set(name, (counts.get(name) ?? 0) + 1)
  }
  return [...counts].map(([name, count]): [string, number] => [name, count / all]).sort((a, b) => b[1] - a[1])
}

async function profile(folder: string, image: string, format: ImageFormat, load: Load): Promise<void> {
  const kind = {
    ...VARVE,
    command: (serving: Parameters<typeof VARVE.command>[0]) => {
      const [node = '', ...rest] = VARVE.command(serving)
      return [node, '--cpu-prof', `--cpu-prof-dir=${folder}/profile`, ...rest]
    },
  }
  const server = await startServer(kind, { image, format, place: { socket: `${image}.sock` } })
  const { value } = await measure(server.uri, load, SECONDS)
  await server.stop()
  const [file = ''] = fs.readdirSync(path.join(folder, 'profile'))
  const found = JSON.parse(fs.readFileSync(path.join(folder, 'profile', file), 'utf8')) as Profile
  fs.rmSync(path.join(folder, 'profile'), { recursive: true })
  console.log(`\n| ${format}, ${load.name}: ${value.toLocaleString('en-US')} a second | share |\n|---|---:|`)
  for (const [name, share] of sharesOf(found).slice(0, FUNCTIONS))
    console.log(`| \`${name}\` | ${(share * 100).toFixed(1)} % |`)
}

async function countCalls(folder: string, image: string, format: ImageFormat, load: Load): Promise<void> {
  const server = await startServer(VARVE, { image, format, place: { socket: `${image}.sock` } })
  await measure(server.uri, load, 1)
  const output = path.join(folder, 'strace')
  const strace = spawn('strace', ['-c', '-f', '-p', String(server.pid), '-o', output], { stdio: 'ignore' })
  const ended = new Promise<void>((resolve, reject) => strace.once('exit', () => resolve()).once('error', reject))
  await new Promise((resolve) => setTimeout(resolve, 1000))
  await measure(server.uri, load, SECONDS)
  strace.kill('SIGINT')
  await ended
  await server.stop()
  const calls = new Map<string, number>()
  for (const line of fs.readFileSync(output, 'utf8').split('\n')) {
    const fields = line.trim().split(/\s+/)
    const count = Number(fields[3])
    if (count > 0 && fields.at(-1) !== 'total') calls.set(fields.at(-1) ?? '', count)
  }
  // Every request of 4 KiB is one read or one write of the image.
  const requests = Math.max(...['pread64', 'preadv2', 'pwrite64', 'pwritev2'].map((name) => calls.get(name) ?? 0))
  const cells = [...calls].filter(([, count]) => count / requests >= 0.001).sort((a, b) => b[1] - a[1])
  const each = cells.map(([name, count]) => `${name} ${(count / requests).toFixed(3)}`).join(', ')
  console.log(`| ${format}, ${load.name} | ${requests.toLocaleString('en-US')} | ${each} |`)
}

const complaint = await build(ROOT, path.join(ROOT, 'dist'))
if (complaint !== undefined) throw new Error(complaint)
const folder = fs.mkdtempSync(path.join(FOLDER, 'varve-hot-path-'))
try {
  const cases = (['raw', 'qcow2'] as const).flatMap((format) =>
    [RANDOM_READ, RANDOM_WRITE].map((load) => ({ format, load, image: path.join(folder, `image.${format}`) })),
  )
  for (const format of ['raw', 'qcow2'] as const) makeImage(path.join(folder, `image.${format}`), format, IMAGE_MIB)
  console.log('| | requests | system calls per request |\n|---|---:|---|')
  for (const { image, format, load } of cases) await countCalls(folder, image, format, load)
  for (const { image, format, load } of cases) await profile(folder, image, format, load)
} finally {
  fs.rmSync(folder, { recursive: true, force: true })
}
