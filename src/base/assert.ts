// Assertions for programmer errors: a broken one means that Varve itself is wrong, so it throws an error that no
// caller catches by kind. Operating errors (a full disk, a bad image) are BlockError, never an assertion.

export class AssertionError extends Error {
  override readonly name = 'AssertionError'
}

/** Throws AssertionError when `condition` is false. `message` says what must hold. */
export function assert(condition: unknown, message = 'assertion failed'): asserts condition {
  if (!condition) throw new AssertionError(message)
}

/** For the end of an exhaustive switch: does not compile while a case is missing. */
export function unreachable(value: never): never {
  throw new AssertionError(`unreachable: ${String(value)}`)
}
