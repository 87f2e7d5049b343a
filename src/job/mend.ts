// Waits out an error of the storage, as the job's policy has it: until the user has mended it and says resume, or for a moment. Then
// the work is tried again; what that is, and that nothing of it was lost, is the job's.

import { ERROR_AGAIN_MS } from '../base/limits.ts'
import { isBlockError } from '../block/error.ts'
import type { Job } from './job.ts'
import { reactionTo } from './terms.ts'

/** Resolves when what failed may be tried again; throws the error when the job ends for it, or what ended the waiting. */
export async function mend(job: Job, error: unknown): Promise<void> {
  if (!isBlockError(error) || !job.mayWait) throw error
  switch (reactionTo(job.onError, error)) {
    case 'end':
      throw error
    case 'wait':
      job.pauseOnError(error)
      break
    case 'again':
      job.noteIgnored(error)
      await job.idle(ERROR_AGAIN_MS)
  }
  await job.pausePoint(0)
}

/** Does the work, and again for as long as what fails can be mended. */
export async function whileMendable<T>(job: Job, work: () => Promise<T>): Promise<T> {
  for (;;) {
    try {
      return await work()
    } catch (error) {
      await mend(job, error)
    }
  }
}
