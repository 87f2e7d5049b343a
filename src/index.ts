// The public parts of Varve for programs that use it as a library: the block device, its guard and its errors, a device in
// memory and the bitmap. Whoever runs disks uses the command or the daemon's API instead.

export { Bitmap } from './bitmap/bitmap.ts'
export {
  type Access,
  type BlockDevice,
  type Capabilities,
  type ExtentVisitor,
  FUA,
  HOLE,
  type Layer,
  MAY_UNMAP,
  OWNED_DATA,
  OWNED_ZERO,
  type Ownership,
  type OwnershipVisitor,
  type Pending,
  type Support,
  UNALLOCATED,
  ZERO,
} from './block/device.ts'
export { BlockError, ERROR_KINDS, type ErrorKind, isBlockError, type Place } from './block/error.ts'
export { Filter } from './block/filter.ts'
export { guard } from './block/guard.ts'
export { MemoryDevice } from './block/memory.ts'
