// Tells in a few microseconds whether bytes look random, as what is compressed or encrypted already does: then compression would only
// take time. From each of 16 parts of the piece it counts a short run of bytes; if the counts of all 256 values are as even as those of random
// bytes, and no part begins as another one does, the piece looks random. It may be wrong either way, and all that costs is space or time.
//
//   piece   |####......|####......|####......|  ...   16 parts, of each the first 128 bytes are counted

const PARTS = 16
const RUN = 128
const VALUES = 256
/** Pieces that are shorter are not worth the look, in bytes. */
const LEAST = PARTS * RUN
/** How often each value is there when all are as frequent. */
const EVEN = LEAST / VALUES
/**
 * The sum of the squared deviations from that, over it (Pearson's statistic). For random bytes it is 255 on average, and above this for one
 * piece in some 20,000; a run of a single value adds 2048, one of English text 100 to 200.
 */
const UNEVEN = 350

const counts = new Uint16Array(VALUES)
const starts = new Uint32Array(PARTS)

/** False for what compresses by more than a few percent, but for content of even counts that repeats in other steps than the parts have. */
export function looksRandom(bytes: Uint8Array): boolean {
  if (bytes.length < LEAST) return false
  const step = Math.floor(bytes.length / PARTS)
  counts.fill(0)
  for (let part = 0; part < PARTS; part++) {
    const from = part * step
    for (let at = from; at < from + RUN; at++) {
      const value = bytes[at] as number
      counts[value] = (counts[value] as number) + 1
    }
    if (repeats(bytes, from, part)) return false
  }
  let sum = 0
  for (const count of counts) sum += (count - EVEN) ** 2
  return sum < UNEVEN * EVEN
}

/** True when the part begins as an earlier one: by chance, one random piece in 36 million does. */
function repeats(bytes: Uint8Array, from: number, part: number): boolean {
  const start =
    (bytes[from] as number) |
    ((bytes[from + 1] as number) << 8) |
    ((bytes[from + 2] as number) << 16) |
    ((bytes[from + 3] as number) << 24)
  starts[part] = start
  return starts.indexOf(start >>> 0) < part
}
