// varve demo: the command; the demo itself is in demo.ts.

import type { Command } from 'commander'
import type { GlobalOptions } from '../context.ts'

export function addDemoCommand(program: Command): void {
  program
    .command('demo')
    .description('the main job on a real image, from snapshot to proved restore')
    .option('--keep <folder>', 'leave all files in this folder')
    .action(async (options: { keep?: string }, command: Command) => {
      const { runDemo } = await import('./demo.ts')
      const { json } = command.optsWithGlobals<GlobalOptions>()
      process.exitCode = await runDemo({ ...options, json: json === true })
    })
}
