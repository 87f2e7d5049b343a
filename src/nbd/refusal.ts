// Errors that a request is answered with by the protocol's own rules, before any device is asked.

import { NBD_ESHUTDOWN } from './spec.ts'

/** Has the number of the error that the client is told ("Error values"). */
export class Refusal extends Error {
  readonly errno: number

  constructor(errno: number, message: string) {
    super(message)
    this.errno = errno
  }
}

export function beingShutDown(): Refusal {
  return new Refusal(NBD_ESHUTDOWN, 'the export is being shut down')
}
