// The part of the table of routes that is about views: moments of disks that a client reads over NBD and backs up itself.

import { z } from 'zod'
import { bytes, job, name, nothing, type Route } from './shapes.ts'

/** Characters of a reason that a client gives. */
const REASON_LENGTH_MAX = 500
/** No name of a bitmap that Varve has for another purpose comes of it. */
const viewTarget = z
  .string()
  .max(1000)
  .regex(/^[A-Za-z0-9][^:]*(:[^:]+)*$/)
export const viewRoutes = {
  openView: {
    method: 'POST',
    path: '/v1/views',
    summary: 'Exports the moment of disks over NBD, for others to read; a job that finalize or cancel ends',
    params: nothing,
    body: z.object({
      disks: z.array(name).min(1),
      bitmap: name
        .optional()
        .describe('What changed is shown by this bitmap, which counts from the moment once the view is finalized'),
      since: name.optional().describe('What changed is shown by this bitmap, which stays as it is'),
      whole: z.boolean().optional().describe('All can be read, not only what changed'),
      acknowledge: z.boolean().optional().describe('A TRIM says that a range has been read'),
      leaseMs: bytes.optional().describe('How long it stays without a request'),
      target: z
        .object({
          name: viewTarget,
          moment: name,
          full: z.array(name).default([]),
          since: name.optional(),
          checkpoint: name.optional(),
        })
        .optional()
        .describe(
          'In place of a bitmap: what a client backs up to, how it calls this moment, of which disks it wants all, and the checkpoints that are meant',
        ),
    }),
    response: job,
  },
  stepView: {
    method: 'POST',
    path: '/v1/views/:view',
    summary: 'For a client with a target of its own: what is durable there so far, or that a bitmap is wrong',
    params: z.object({ view: name }),
    body: z.discriminatedUnion('step', [
      z.object({ step: z.literal('part'), part: name }),
      z.object({ step: z.literal('distrust'), disk: name, reason: z.string().min(1).max(REASON_LENGTH_MAX) }),
    ]),
    response: nothing,
  },
} as const satisfies Record<string, Route>
