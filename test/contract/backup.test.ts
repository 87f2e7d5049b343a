// The contract of what `varve export --writable` serves: an overlay that is thrown away, over a disk of a backup.

import { initInline, openBackedUp } from '../support/backups.ts'
import { openThrowAwayOverlay } from '../../src/cli/throw-away-overlay.ts'
import { MemoryStore } from '../../src/repository/stores/memory.ts'
import { tempFolder } from '../support/temp.ts'
import { deviceContract } from './device.ts'

deviceContract('throw-away overlay over a backup', async (t, size) => {
  const repository = await initInline(new MemoryStore())
  const device = await openBackedUp(repository, Buffer.alloc(size))
  return openThrowAwayOverlay(device, tempFolder(t))
})
