// Memory that was let go goes back to the system. The allocator keeps what the buffers of one backup after the other took, in pieces all over its
// arenas: after a hundred of them two thirds of the daemon's memory were such, which nothing but this call gives back.

import { SPARE_MEMORY_MS } from '../base/limits.ts'
import { syscalls } from './syscalls.ts'

let timer: NodeJS.Timeout | undefined

/** In a moment, once for all who ask until then. */
export function giveBackMemory(): void {
  if (syscalls === undefined || timer !== undefined) return
  timer = setTimeout(() => {
    timer = undefined
    void syscalls?.trimMemory()
  }, SPARE_MEMORY_MS).unref()
}
