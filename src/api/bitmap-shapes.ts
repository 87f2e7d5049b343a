// The shapes of bitmaps in the API: what is shown of one, and what can be done with it.

import { z } from 'zod'
import { bytes, name } from './shapes.ts'

export const durability = z
  .enum(['host', 'process', 'none'])
  .describe('What a bitmap outlives; after the rest it is void')

export const bitmap = z.object({
  name: z.string(),
  granule: z.number(),
  recording: z.boolean(),
  state: z.enum(['valid', 'void']),
  durability,
  since: z.string().optional().describe('The backup that it counts from'),
  dirtyBytes: bytes,
  distrust: z.string().optional().describe('Why its bits are not believed until a full by comparison is done'),
})

export const bitmapEdit = z.union([
  z.object({
    edit: z.literal('add'),
    name,
    granule: bytes.optional(),
    disabled: z.boolean().optional(),
    from: name.optional().describe('A bitmap to copy'),
    durability: durability.optional(),
  }),
  z.object({ edit: z.enum(['remove', 'clear', 'enable', 'disable']), name }),
  z.object({ edit: z.literal('rename'), name, to: name }),
  z.object({ edit: z.literal('merge'), name, into: name }),
])
