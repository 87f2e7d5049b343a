// Where guest data and L2 tables must never go, whatever the tables of a damaged image say: over the structures that have one
// place in the file and are found from the header. A cheap look before each write; a whole look is the check's (check.ts).

import type { Header } from './header.ts'
import * as spec from './spec.ts'

/** The structure that the `length` bytes at `host` in the image would hit; undefined for none. */
export function structureAt(header: Readonly<Header>, host: number, length: number): string | undefined {
  const end = host + length
  if (host < header.clusterSize) return 'header'
  if (host < header.l1Offset + header.l1Size * spec.ENTRY_SIZE && end > header.l1Offset) return 'L1 table'
  const refcountTableLength = header.refcountTableClusters * header.clusterSize
  if (host < header.refcountTableOffset + refcountTableLength && end > header.refcountTableOffset)
    return 'refcount table'
  return undefined
}
