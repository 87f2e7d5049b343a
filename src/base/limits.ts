// Every bound of Varve in one place. A queue, cache, buffer or in-flight counter takes its limit from here, so that
// the memory of a daemon can be added up by reading this file.

const KIB = 1024
const MIB = 1024 * KIB

/** Longest time that a loop over data at hand keeps the event loop, in milliseconds. */
export const BREATH_MS = 0.5

/** Smallest and largest granule of a bitmap, in bytes; 4 KiB unless told. */
export const GRANULE = 4 * KIB
export const GRANULE_MIN = 512
export const GRANULE_MAX = 16 * MIB

/** Largest single request of a device, in bytes: what one buffer of the pool holds at most. */
export const REQUEST_MAX = 32 * MIB

/** Smallest pooled buffer, and the most bytes that a thread's pool keeps free for the next request. */
export const POOL_BUFFER_MIN = 4 * KIB
export const POOL_FREE_BYTES = 64 * MIB
