// The border between errors and HTTP: a total table from kind to status code, and back by the kind in the body.

import type { ErrorKind } from '../block/error.ts'

export const HTTP_STATUS: Record<ErrorKind, number> = {
  io: 500,
  'no-space': 507,
  'out-of-range': 400,
  'read-only': 403,
  unsupported: 422,
  'invalid-format': 422,
  corrupt: 422,
  'invalid-argument': 400,
  'not-found': 404,
  exists: 409,
  busy: 409,
  closed: 409,
  cancelled: 409,
  timeout: 504,
  permission: 403,
  protocol: 502,
}
