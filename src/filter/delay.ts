// Makes every request wait before it goes on, for tests and for simulating slow storage.

import { type Clock, systemClock } from '../base/clock.ts'
import type { BlockDevice, Pending } from '../block/device.ts'
import { InterceptFilter, type Request } from './intercept.ts'

export class DelayFilter extends InterceptFilter {
  /** `delayMs` is asked per request; 0 lets it pass within the call. */
  constructor(inner: BlockDevice, delayMs: (request: Request) => number, clock: Pick<Clock, 'sleep'> = systemClock) {
    super(inner, (request): Pending => {
      const wait = delayMs(request)
      return wait > 0 ? clock.sleep(wait) : undefined
    })
  }
}
