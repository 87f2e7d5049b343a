// What a QEMU can do, by what its monitor takes (query-qmp-schema, docs/devel/qapi-code-gen in QEMU), not by its version: distributions
// move features between versions.

import { BlockError } from '../../block/error.ts'
import type { QmpClient } from './qmp-client.ts'

interface SchemaEntity {
  readonly name: string
  readonly 'meta-type': string
  readonly 'arg-type'?: string
  readonly members?: readonly { readonly name: string; readonly type: string }[]
  readonly variants?: readonly { readonly case: string; readonly type: string }[]
}

/** What a moment by nodes of ours needs: commands, and options of the node that saves old data. */
const COMMANDS = [
  'blockdev-add',
  'blockdev-reopen',
  'block-export-add',
  'block-dirty-bitmap-merge',
  'x-debug-query-block-graph',
] as const
const FILTER_OPTIONS = ['on-cbw-error', 'cbw-timeout'] as const

/** Kind 'unsupported', with what is missing, for a QEMU that cannot show a moment of its disks as Varve has it done. */
export async function checkAbilities(client: QmpClient): Promise<void> {
  const entities = (await client.execute('query-qmp-schema')) as readonly SchemaEntity[]
  const commands = new Set(entities.filter((entity) => entity['meta-type'] === 'command').map(({ name }) => name))
  const options = optionsOf(entities, 'copy-before-write')
  const missing = [
    ...COMMANDS.filter((name) => !commands.has(name)),
    ...(optionsOf(entities, 'snapshot-access') === undefined ? ['snapshot-access'] : []),
    ...FILTER_OPTIONS.filter((name) => options?.includes(name) !== true),
  ]
  if (missing.length === 0) return
  const { major, minor } = client.version
  const message = `${client.name} is version ${major}.${minor} and lacks ${missing.join(', ')}: backups need QEMU 7.2 or newer`
  throw new BlockError('unsupported', message)
}

/** The options of a driver in blockdev-add; undefined when it is not there. */
function optionsOf(entities: readonly SchemaEntity[], driver: string): readonly string[] | undefined {
  const named = new Map(entities.map((entity) => [entity.name, entity]))
  const add = entities.find((entity) => entity.name === 'blockdev-add' && entity['meta-type'] === 'command')
  const variants = named.get(add?.['arg-type'] ?? '')?.variants ?? []
  const variant = variants.find((one) => one.case === driver)
  return variant === undefined ? undefined : named.get(variant.type)?.members?.map(({ name }) => name)
}
