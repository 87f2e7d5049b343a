// The shapes that several tables of the API share: names and sizes, how a job is run, a job as it is shown.

import { z } from 'zod'

/** Characters of the longest name that a request may have. */
export const NAME_LENGTH_MAX = 1023

export const name = z.string().min(1).max(NAME_LENGTH_MAX)
export const bytes = z.number().int().nonnegative()
export const nothing = z.object({})

export interface Route {
  readonly method: 'GET' | 'POST' | 'DELETE'
  readonly path: string
  readonly summary: string
  readonly params: z.ZodType
  readonly body: z.ZodType
  readonly response: z.ZodType
  /** Not for requests from the network, whatever token they have. */
  readonly local?: true
}

export const prove = z
  .number()
  .optional()
  .describe('Percent of what the bitmaps call unchanged that is read and compared with the backup before')

/** How a job is run, whatever it does. */
export const terms = {
  speed: bytes.default(0).describe('Bytes per second; 0 is no limit'),
  onError: z
    .enum(['report', 'ignore', 'stop', 'enospc'])
    .optional()
    .describe('An error ends the job, is tried again by itself, pauses it, or pauses it only when the target is full'),
  finalize: z.enum(['auto', 'manual']).optional().describe('By hand: the result waits for the verb finalize'),
  dismiss: z.enum(['auto', 'manual']).optional().describe('By hand: an ended job stays listed until it is dismissed'),
  guestLatency: z
    .number()
    .nonnegative()
    .optional()
    .describe(
      'Milliseconds that a request of the guest takes at most, on the average; found out unless told, 0 does not look',
    ),
}

export const job = z.object({
  id: z.string(),
  kind: z.string(),
  subject: z.string(),
  state: z.string(),
  verbs: z.array(z.string()),
  done: bytes,
  total: bytes,
  restMs: z.number().optional().describe('Milliseconds to go at the present pace'),
  resumedAt: bytes,
  speed: bytes,
  guest: z
    .object({ latencyMs: z.number(), targetMs: z.number(), rate: z.number().optional() })
    .optional()
    .describe('What a request of the guest takes on the average, may take, and the bytes per second kept to for that'),
  onError: z.string(),
  startedMs: z.number(),
  endedMs: z.number().optional(),
  dismissed: z.boolean().describe('Ended, and only kept as history'),
  error: z.object({ kind: z.string(), message: z.string() }).optional(),
  details: z.record(z.string(), z.unknown()),
})
