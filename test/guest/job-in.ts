// Waits for a job of QEMU's, at another monitor than the one that the command under test holds.

import { QmpClient } from '../../src/source/qemu/qmp-client.ts'

/** Returns when QEMU has a job whose name begins like that. */
export async function jobIn(qmp: string, prefix: string): Promise<void> {
  const client = await QmpClient.open(qmp)
  for (;;) {
    const jobs = (await client.execute('query-jobs')) as readonly { readonly id: string }[]
    if (jobs.some(({ id }) => id.startsWith(prefix))) break
    await new Promise((resolve) => setTimeout(resolve, 20))
  }
  client.close()
}
