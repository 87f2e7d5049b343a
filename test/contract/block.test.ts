// The contract of the devices that need nothing below them: memory, and a filter that changes nothing.

import { Filter } from '../../src/block/filter.ts'
import { MemoryDevice } from '../../src/block/memory.ts'
import { deviceContract } from './device.ts'

deviceContract('memory device', async (_t, size) => new MemoryDevice(size))
deviceContract('no-op filter', async (_t, size) => new Filter(new MemoryDevice(size)))
