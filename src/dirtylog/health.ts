// How a dirty log is: what it tells others, and what it knows of itself.

import type { BlockError } from '../block/error.ts'

/** 'late': a fold failed and is tried again; nothing is lost. 'voided': bitmaps were lost, and the log works again. 'failed': marks fail. */
export type Health =
  | { readonly state: 'good' }
  | { readonly state: 'late' | 'voided' | 'failed'; readonly cause: BlockError }

export type State =
  | { readonly kind: 'open' }
  | { readonly kind: 'voiding'; readonly done: Promise<void> }
  | { readonly kind: 'failed'; readonly cause: BlockError }
  | { readonly kind: 'closed' }
