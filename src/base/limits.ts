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

/** Longest chain that opens, in layers: more is a mistake or an attack. */
export const CHAIN_LAYERS_MAX = 512

/** Memory of one chain's resolved layer map, in bytes (one byte per cluster), and how much of the disk one look resolves, in units. */
export const LAYER_MAP_BYTES = 16 * MIB
export const LAYER_MAP_PAGE = 4096

/** How long a drain waits for the requests in flight before it gives up, in milliseconds. */
export const DRAIN_TIMEOUT_MS = 30_000

/** Copy space of one point in time and of all of a host together, in bytes, unless told otherwise. */
export const SCRATCH_BYTES = 4 * 1024 * MIB
export const SCRATCH_HOST_BYTES = 16 * 1024 * MIB
