// libvirt, by its own command: virsh, run once for each question, so that what is done to a machine is what libvirt did and knows of. It has no
// classes of errors: what kind one is is told by its words, of which those that matter have not changed since libvirt 6.

import { spawn } from 'node:child_process'
import { VIRSH_MS, VIRSH_REPLY_MAX } from '../../base/qemu-limits.ts'
import { BlockError, type ErrorKind, toBlockError } from '../../block/error.ts'

export interface DomainPlace {
  /** The name of the machine at libvirt. */
  readonly domain: string
  /** URI of its libvirt. */
  readonly connect: string
}

export interface VirshOutcome {
  readonly status: number
  readonly stdout: string
  readonly stderr: string
}

/** Runs virsh with these arguments. Kinds 'not-found' when there is none, 'timeout' when it was killed after so many milliseconds. */
export type RunVirsh = (args: readonly string[], limitMs: number) => Promise<VirshOutcome>

interface Meaning {
  readonly says: RegExp
  readonly kind: ErrorKind
  /** What to do about it. */
  readonly advice?: (place: DomainPlace) => string
}

/** By what virsh says; anything else is 'io'. The first that fits. */
const MEANINGS: readonly Meaning[] = [
  {
    says: /failed to get domain/,
    kind: 'not-found',
    advice: ({ connect }) => `virsh -c ${connect} list --all shows those there are`,
  },
  {
    says: /failed to connect to the hypervisor/,
    kind: 'closed',
    advice: ({ connect }) => `does libvirt run, and may this user use ${connect}?`,
  },
  { says: /not found: no domain (?:backup job|checkpoint)/, kind: 'not-found' },
  {
    says: /domain is not running|inactive domain/,
    kind: 'closed',
    advice: ({ connect, domain }) => `virsh -c ${connect} start ${domain}`,
  },
  {
    says: /cannot acquire state change lock|block job|another job/,
    kind: 'busy',
    advice: ({ connect, domain }) => `virsh -c ${connect} domjobinfo ${domain} shows what is under way`,
  },
  { says: /[Oo]peration not supported|unsupported configuration|unknown command/, kind: 'unsupported' },
  { says: /[Pp]ermission denied|authentication/, kind: 'permission' },
]

export class Virsh {
  readonly place: DomainPlace
  /** For messages. */
  readonly name: string
  readonly #run: RunVirsh

  constructor(place: DomainPlace, run: RunVirsh = runVirsh) {
    this.place = place
    this.name = `domain ${place.domain} at ${place.connect}`
    this.#run = run
  }

  /** What a command about the domain prints. Kinds as in the table above, and of running it. */
  ask(command: string, args: readonly string[] = [], limitMs: number = VIRSH_MS): Promise<string> {
    return this.#ask([command, '--domain', this.place.domain, ...args], limitMs)
  }

  /** Of the QEMU that libvirt runs, such as "7.2.22". */
  async version(): Promise<string> {
    const said = await this.#ask(['version'], VIRSH_MS)
    return /Running hypervisor: QEMU ([\d.]+)/.exec(said)?.[1] ?? 'of unknown version'
  }

  async #ask(args: readonly string[], limitMs: number): Promise<string> {
    const { status, stdout, stderr } = await this.#run(['-c', this.place.connect, '-q', ...args], limitMs)
    if (status === 0) return stdout
    const said = stderr
      .split('\n')
      .map((line) => line.replace(/^error: /, '').trim())
      .filter((line) => line !== '')
      .join(': ')
    const meaning = MEANINGS.find(({ says }) => says.test(said))
    const advice = meaning?.advice?.(this.place)
    const message = `${this.name}: virsh ${args[0]} fails: ${said || `status ${status}`}`
    throw new BlockError(meaning?.kind ?? 'io', advice === undefined ? message : `${message}; ${advice}`)
  }
}

/** The virsh of this host. */
export async function runVirsh(args: readonly string[], limitMs: number): Promise<VirshOutcome> {
  const env = { ...process.env, LC_ALL: 'C' }
  const child = spawn('virsh', args, {
    stdio: ['ignore', 'pipe', 'pipe'],
    env,
    timeout: limitMs,
    killSignal: 'SIGKILL',
  })
  let stdout = ''
  let stderr = ''
  child.stdout.setEncoding('utf8').on('data', (text: string) => {
    stdout += text
    if (stdout.length > VIRSH_REPLY_MAX) child.kill('SIGKILL')
  })
  child.stderr.setEncoding('utf8').on('data', (text: string) => (stderr = (stderr + text).slice(-VIRSH_REPLY_MAX)))
  try {
    const status = await new Promise<number | null>((resolve, reject) => {
      child.once('error', reject)
      child.once('close', resolve)
    })
    if (status !== null) return { status, stdout, stderr }
    const why = stdout.length > VIRSH_REPLY_MAX ? 'says too much' : `did not end within ${limitMs} ms`
    throw new BlockError('timeout', `virsh ${args.slice(3).join(' ')} ${why}, and was killed`)
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw toBlockError(error, 'virsh')
    const message = 'virsh is not installed, by which machines of libvirt are reached: Debian has it in libvirt-clients'
    throw new BlockError('not-found', message)
  }
}
