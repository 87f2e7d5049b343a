// Checks of small records that were read from a store: each field, before anything believes it.

import { BlockError } from '../block/error.ts'
import { FORMAT_VERSION } from './spec.ts'

export type Check = (value: unknown) => boolean
/** One check for each field of T: a field that is added to T does not compile without one. */
export type Shape<T> = { readonly [field in keyof Required<T>]: Check }

export const isText: Check = (value) => typeof value === 'string' && value !== ''
export const isCount: Check = (value) => Number.isSafeInteger(value) && (value as number) >= 0
export const matches =
  (pattern: RegExp): Check =>
  (value) =>
    typeof value === 'string' && pattern.test(value)
export const isOneOf =
  (...values: readonly unknown[]): Check =>
  (value) =>
    values.includes(value)
export const isListOf =
  (check: Check): Check =>
  (value) =>
    Array.isArray(value) && value.every(check)
export const isObject = (value: unknown): value is Record<string, unknown> =>
  typeof value === 'object' && value !== null && !Array.isArray(value)
export const isLabels: Check = (value) =>
  isObject(value) && Object.values(value).every((each) => typeof each === 'string')
export const isUuid = matches(/^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/)
/** An id of a backup or of a pruning. */
export const isId = matches(/^\d{8}T\d{9}Z-[0-9a-f]{8}$/)

/** The first field that does not fit, or undefined when all do. */
export function misfit<T>(shape: Shape<T>, value: unknown): string | undefined {
  if (!isObject(value)) return 'the whole'
  return Object.entries<Check>(shape).find(([field, check]) => !check(value[field]))?.[0]
}

/** The value as a T. Kind 'invalid-format' when it has another version or shape; `where` names it. */
export function fitted<T>(shape: Shape<T>, value: unknown, where: string): T {
  const format = (value as { format?: unknown } | null)?.format
  if (format !== FORMAT_VERSION) {
    const message = `${where} has format version ${String(format)}; this Varve reads version ${FORMAT_VERSION}: use a newer one`
    throw new BlockError('invalid-format', message, { path: where })
  }
  const field = misfit(shape, value)
  if (field === undefined) return value as T
  throw new BlockError('invalid-format', `${where} is not as this Varve expects it: see "${field}"`, { path: where })
}
