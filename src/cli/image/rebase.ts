// varve image rebase: gives an overlay another backing file, or none.

import { type Command, Option } from 'commander'
import { BlockError } from '../../block/error.ts'
import { FORMATS, type Format } from '../../chain/open.ts'
import { realHost } from '../../host/real.ts'
import {
  allowOption,
  formatOption,
  type ImageOptions,
  outputOption,
  printResult,
  progressOption,
  quietOption,
  whatToOpen,
  withProgress,
} from './options.ts'

interface RebaseOptions extends ImageOptions {
  readonly backing: string
  readonly backingFormat?: Format
  readonly unsafe?: boolean
  readonly progress?: boolean
  readonly quiet?: boolean
}

export function addRebaseCommand(image: Command): void {
  image
    .command('rebase <image>')
    .description('give an overlay another backing file; the disk reads as before')
    .addOption(formatOption())
    .requiredOption('-b, --backing <image>', 'the new backing file, as the header shall name it; "" for none')
    .addOption(new Option('-F, --backing-format <format>', 'format of the new backing file').choices(FORMATS))
    .option('-u, --unsafe', 'change the name alone, for a backing file that was moved')
    .addOption(allowOption())
    .addOption(progressOption())
    .addOption(quietOption())
    .addOption(outputOption())
    .action(rebaseCommand)
}

async function rebaseCommand(path: string, options: RebaseOptions, command: Command): Promise<void> {
  const { rebaseImage } = await import('../../image/rebase.ts')
  const { backing: name, backingFormat: format, unsafe = false } = options
  if (name !== '' && format === undefined)
    throw new BlockError('invalid-argument', `say the format of ${name} with -F raw or -F qcow2`)
  const backing = name === '' || format === undefined ? undefined : { name, format }
  await withProgress('rebase', options.progress, (progress) =>
    rebaseImage({ host: realHost, path, ...whatToOpen(options), backing, unsafe, progress }),
  )
  if (options.quiet === true) return
  const result = { filename: path, ...(backing && { 'backing-filename': name, 'backing-filename-format': format }) }
  printResult(command, result, () =>
    backing === undefined ? `${path} has no backing file any more` : `${path} is based on ${name}`,
  )
}
