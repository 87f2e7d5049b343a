// What the commands about repositories share: the options that name one and open it, and opening it for one piece of work.

import { type Command, Option } from 'commander'
import { openRepositoryAt } from '../shard/repositories.ts'
import type { Repository } from '../repository/repository.ts'

/** What opens an encrypted repository; else the environment says it. */
export interface RepositoryFlags {
  readonly passphraseFile?: string
  readonly keyFile?: string
}

export const repoOption = (): Option => new Option('--repo <folder>', 'the repository').makeOptionMandatory()

/** Adds the options that open an encrypted repository. */
export function withKeys(command: Command): Command {
  return command
    .addOption(new Option('--passphrase-file <file>', 'its passphrase (or VARVE_PASSPHRASE_FILE)').conflicts('keyFile'))
    .option('--key-file <file>', 'its key (or VARVE_KEY_FILE)')
}

/** Opens a repository for one piece of work and closes it. */
export async function withRepository<T>(
  folder: string,
  flags: RepositoryFlags,
  work: (repository: Repository) => Promise<T>,
): Promise<T> {
  const repository = await openRepositoryAt(folder, flags)
  try {
    return await work(repository)
  } finally {
    await repository.close()
  }
}
