// What a backup says at its end: which it is, how and why each disk was backed up, what was read and stored, what was proved.

import type { JobReply } from '../api/schema.ts'
import { formatSize } from '../base/size.ts'

interface DiskKind {
  readonly name: string
  readonly kind: string
  readonly reason: string
  readonly compared?: string
}

/** By the details of its job; without figures as long as it runs. */
export function describeBackup(details: JobReply['details'], withFigures: boolean): string {
  const figures = withFigures
    ? [
        `read ${formatSize(Number(details['readBytes']))}, stored ${formatSize(Number(details['storedBytes']))}`,
        ...proofLines(details),
      ]
    : []
  return [String(details['backup']), ...kindLines(details), ...skippedLines(details), ...figures].join('\n')
}

function kindLines(details: JobReply['details']): string[] {
  return (details['disks'] as DiskKind[]).map(({ name, kind, reason, compared }) => {
    const how = compared === undefined ? kind : `${kind} by comparison with ${compared}`
    return `${name}: ${how} (${reason})`
  })
}

function skippedLines(details: JobReply['details']): string[] {
  const skipped = (details['skipped'] ?? []) as readonly { readonly name: string; readonly reason: string }[]
  return skipped.map(({ name, reason }) => `${name}: not in it (${reason})`)
}

/** Only disks with a bitmap had something to prove. */
function proofLines(details: JobReply['details']): string[] {
  const proofs = (details['proofs'] ?? []) as ({ percent: number; seed: number; readBytes: number } | null)[]
  const names = (details['disks'] as DiskKind[]).map(({ name }) => name)
  return proofs.flatMap((proof, index) => {
    if (proof === null) return []
    const { percent, seed, readBytes } = proof
    return [`${names[index]}: proved ${percent} % of what did not change, ${formatSize(readBytes)}, by seed ${seed}`]
  })
}
