// The contract of the stores: memory, a folder of the real host and one of the simulated host.

import path from 'node:path'
import { Random } from '../../src/base/random.ts'
import { realHost } from '../../src/host/real.ts'
import { SimulatedHost } from '../../src/host/simulated.ts'
import { DirectoryStore } from '../../src/repository/stores/directory.ts'
import { MemoryStore } from '../../src/repository/stores/memory.ts'
import { RetryingStore } from '../../src/repository/stores/retrying.ts'
import { tempFolder } from '../support/temp.ts'
import { storeContract } from './store.ts'

storeContract('memory store', async () => new MemoryStore())
storeContract('directory store', async (t) => new DirectoryStore(realHost, path.join(tempFolder(t), 'a', 'repository')))
storeContract(
  'directory store on the simulated host',
  async () => new DirectoryStore(new SimulatedHost({ scheduler: new Random(5) }), '/srv/repository'),
)
storeContract('retrying store', async () => new RetryingStore(new MemoryStore()))
