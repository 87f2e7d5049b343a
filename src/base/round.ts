// Rounding of offsets and lengths. Bit operators stop at 32 bits, so 64-bit sizes use division.

export function roundDown(value: number, unit: number): number {
  return value - (value % unit)
}

export function roundUp(value: number, unit: number): number {
  return divideUp(value, unit) * unit
}

export function divideUp(value: number, unit: number): number {
  return Math.ceil(value / unit)
}

export function isPowerOfTwo(value: number): boolean {
  return value > 0 && Number.isSafeInteger(value) && Number.isInteger(Math.log2(value))
}
