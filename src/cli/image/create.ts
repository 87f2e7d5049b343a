// varve image create: makes an empty image, or an overlay over a backing file.

import { type Command, Option } from 'commander'
import { formatSize } from '../../base/size.ts'
import { FORMATS, type Format } from '../../chain/open.ts'
import { realHost } from '../../host/real.ts'
import { sizeArgument } from '../context.ts'
import { allowOption, createOption, type ImageOptions, outputOption, printResult, quietOption } from './options.ts'

interface CreateOptions extends ImageOptions {
  readonly format: Format
  readonly options?: readonly string[]
  readonly backing?: string
  readonly backingFormat?: Format
  readonly unsafe?: boolean
  readonly force?: boolean
  readonly quiet?: boolean
}

export function addCreateCommand(image: Command): void {
  image
    .command('create <image> [size]')
    .description('make an empty image; without a size it has that of its backing file')
    .addOption(new Option('-f, --format <format>', 'format of the image').choices(FORMATS).default('raw'))
    .addOption(createOption())
    .option('-b, --backing <image>', 'backing file, as the header shall name it')
    .addOption(new Option('-F, --backing-format <format>', 'format of the backing file').choices(FORMATS))
    .option('-u, --unsafe', 'do not look at the backing file')
    .option('--force', 'replace a file that is there')
    .addOption(allowOption())
    .addOption(quietOption())
    .addOption(outputOption())
    .action(createCommand)
}

async function createCommand(
  path: string,
  sizeText: string | undefined,
  options: CreateOptions,
  command: Command,
): Promise<void> {
  const { parseCreateOptions } = await import('../../image/create-options.ts')
  const { createImage } = await import('../../image/create.ts')
  const { format, backing, backingFormat, unsafe = false, force = false, allow = [] } = options
  const settings = parseCreateOptions(format, options.options ?? [])
  if (sizeText !== undefined) settings.size = sizeArgument(sizeText)
  if (backing !== undefined) settings.backingName = backing
  if (backingFormat !== undefined) settings.backingFormat = backingFormat
  const size = await createImage({ host: realHost, path, format, settings, unsafe, force, allowedFolders: allow })
  if (options.quiet === true) return
  printResult(
    command,
    { filename: path, format, 'virtual-size': size },
    () => `made ${path}: ${format}, ${formatSize(size)}`,
  )
}
