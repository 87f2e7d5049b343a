// Asks before what cannot be taken back. Without a terminal to ask on, `--yes` has to have been said.

import { createInterface } from 'node:readline/promises'
import { BlockError } from '../block/error.ts'
import type { Cli } from './daemon-context.ts'

/** Kind 'invalid-argument' when nobody can be asked, 'cancelled' when the answer is not yes. */
export async function confirm(cli: Cli, question: string): Promise<void> {
  if (cli.json || !process.stdin.isTTY) throw new BlockError('invalid-argument', `${question}: say --yes to go on`)
  const terminal = createInterface({ input: process.stdin, output: process.stderr })
  const answer = await terminal.question(`${question}. Go on? [y/N] `)
  terminal.close()
  if (!/^y(es)?$/i.test(answer.trim())) throw new BlockError('cancelled', 'nothing was changed')
}
