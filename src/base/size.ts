// Sizes as people write them: "512M", "4G", "65536". Powers of 1024, as qemu-img has them.

const UNITS: Readonly<Record<string, number>> = {
  '': 1,
  K: 1024,
  M: 1024 ** 2,
  G: 1024 ** 3,
  T: 1024 ** 4,
  P: 1024 ** 5,
}

/** Bytes, or undefined when the text is no size. Fractions are allowed with a unit ("1.5G"). */
export function parseSize(text: string): number | undefined {
  const match = /^(\d+(?:\.\d+)?)\s*([KMGTP]?)(?:i?B)?$/i.exec(text.trim())
  if (match === null) return undefined
  const [, number, unit] = match
  const bytes = Number(number) * (UNITS[(unit as string).toUpperCase()] as number)
  return Number.isSafeInteger(bytes) ? bytes : undefined
}

/** "1.5 GiB" */
export function formatSize(bytes: number): string {
  const names = ['B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB']
  let unit = 0
  let value = bytes
  while (value >= 1024 && unit < names.length - 1) {
    value /= 1024
    unit++
  }
  return `${unit === 0 ? value : value.toFixed(value < 10 ? 2 : 1)} ${names[unit]}`
}
