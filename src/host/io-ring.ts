// Reads and writes past the page cache by Linux's io_uring: many under way at once, without a thread for each, which the kernel
// would have to wake for every one. One ring for a thread. Requests of one turn of the event loop are handed over in one call;
// what is done is told by an eventfd, on which one thread of the pool waits. To wake that takes as long as a quick disk does: so while
// requests are under way at one, the event loop turns instead of sleeping, and looks each time. Where there is no io_uring, `ioRing` gives undefined.
//
//   request -> submission queue --enter--> kernel -> completion queue --eventfd--> callback
//              (memory shared with it)               (likewise)
//
// The layouts are those of linux/io_uring.h; its memory barriers are Atomics. A thread that dies leaves its ring and its bounce buffers
// behind, since the kernel may still be at work in them.

import fs from 'node:fs'
import { getSystemErrorMessage, getSystemErrorName } from 'node:util'
import { assert } from '../base/assert.ts'
import { DIRECT_PIECES } from '../base/limits.ts'
import { addressOf, type Koffi, koffi, mapMemory } from './koffi.ts'
import { SpinPace } from './spin-pace.ts'

const IORING_OP_TIMEOUT = 11
export const IORING_OP_READ = 22
export const IORING_OP_WRITE = 23

const IO_URING_SETUP = 425
const IO_URING_ENTER = 426
const IO_URING_REGISTER = 427
const IORING_REGISTER_EVENTFD = 4
const IORING_FEAT_SINGLE_MMAP = 1
const IORING_OFF_SQES = 0x10000000
const EFD_CLOEXEC = 0o2000000
const IORING_CQ_EVENTFD_DISABLED = 1

const RETRY_MS = 1
/** How long the waiting goes on after the last request: struct __kernel_timespec, seconds and nanoseconds of 64 bits each. */
const LINGER = new BigInt64Array([0n, 250_000_000n])
/** Added to the eventfd, a number of 64 bits. */
const ONE = new Uint8Array(new BigUint64Array([1n]).buffer)

const PARAMS_SIZE = 120
/** Places in struct io_uring_params, in units of 32 bits. */
const AT_FEATURES = 5
const SQ = { head: 10, tail: 11, mask: 12, entries: 13, array: 16 } as const
const CQ = { head: 20, tail: 21, mask: 22, entries: 23, entriesAt: 25, flags: 26 } as const
const SQE_SIZE = 64
const CQE_SIZE = 16

/** Called once: the bytes that were moved, or the error. */
type Moved = (error: NodeJS.ErrnoException | null, count: number) => void

class IoRing {
  readonly #enter: (submit: number) => number
  /** The ring's head and tail words, its completions and the order of submissions, in units of 32 bits; and the submissions. */
  readonly #words: Int32Array
  readonly #params: Uint32Array
  readonly #requests: Uint32Array
  readonly #event: number
  readonly #told = new Uint8Array(8)
  readonly #waiting: (Moved | undefined)[] = []
  readonly #free: number[] = []
  #queued = 0
  #users = 0
  #underWay = 0
  /** Something was submitted since the time began to run. */
  #wasUsed = false
  #isTimed = false
  #isWatching = false
  readonly #pace = new SpinPace()
  /** The event loop turns, and the thread of the pool is not told. */
  #isTurning = false

  constructor(koffi: Koffi) {
    const libc = koffi.load(null)
    const setup = libc.func('int64_t syscall(int64_t number, uint32_t entries, void *params)')
    const enter = libc.func(
      'int64_t syscall(int64_t number, int fd, uint32_t submit, uint32_t wait, uint32_t flags, void *sig)',
    )
    const register = libc.func('int64_t syscall(int64_t number, int fd, uint32_t what, void *argument, uint32_t count)')
    const eventfd = libc.func('int eventfd(unsigned int value, int flags)')
    const checked = (result: unknown): number => {
      if (Number(result) < 0) throw systemError(-koffi.errno())
      return Number(result)
    }
    const params = new Uint32Array(PARAMS_SIZE / 4)
    const fd = checked(setup(IO_URING_SETUP, DIRECT_PIECES * 2, params))
    if (((params[AT_FEATURES] as number) & IORING_FEAT_SINGLE_MMAP) === 0) throw new Error('the kernel is too old')
    const place = (at: number): number => params[at] as number
    const ringLength = Math.max(place(SQ.array) + place(0) * 4, place(CQ.entriesAt) + place(1) * CQE_SIZE)
    this.#params = params
    this.#words = new Int32Array(mapMemory(koffi, ringLength, fd))
    this.#requests = new Uint32Array(mapMemory(koffi, place(0) * SQE_SIZE, fd, IORING_OFF_SQES))
    this.#event = checked(eventfd(0, EFD_CLOEXEC))
    checked(register(IO_URING_REGISTER, fd, IORING_REGISTER_EVENTFD, new Int32Array([this.#event]), 1))
    this.#enter = (submit) => Number(enter(IO_URING_ENTER, fd, submit, 0, 0, null))
    for (let i = DIRECT_PIECES - 1; i >= 0; i--) this.#free.push(i)
  }

  /** For an open user: moves the first `length` bytes of the buffer, which is the kernel's until `moved`. At most DIRECT_PIECES at once. */
  submit(operation: number, fd: number, buffer: Uint8Array, length: number, offset: number, moved: Moved): void {
    assert(length <= buffer.length, 'the kernel writes wherever it is told to')
    const place = this.#free.pop()
    assert(place !== undefined, 'each request has a bounce buffer, of which there are as many as places')
    this.#waiting[place] = moved
    if (this.#underWay++ === 0) this.#pace.began(performance.now())
    this.#wasUsed = true
    this.#queue(operation, fd, addressOf(buffer.buffer) + buffer.byteOffset, length, offset, place)
  }

  #queue(operation: number, fd: number, address: number, length: number, offset: number, place: number): void {
    const index = (this.#load(SQ.tail) + this.#queued) & this.#mask(SQ.mask)
    const at = (index * SQE_SIZE) / 4
    const request = this.#requests
    request.fill(0, at, at + SQE_SIZE / 4)
    request[at] = operation
    request[at + 1] = fd
    request[at + 2] = offset
    request[at + 3] = offset / 2 ** 32
    request[at + 4] = address
    request[at + 5] = address / 2 ** 32
    request[at + 6] = length
    request[at + 8] = place
    this.#words[this.#at(SQ.array) + index] = index
    if (this.#queued++ === 0) process.nextTick(this.#handOver)
  }

  /** Another file uses the ring. */
  open(): void {
    this.#users++
  }

  /** One uses it no longer; nothing of it is under way. */
  close(): void {
    if (--this.#users === 0 && this.#isWatching) fs.writeSync(this.#event, ONE)
  }

  readonly #handOver = (): void => {
    Atomics.store(this.#words, this.#at(SQ.tail), this.#load(SQ.tail) + this.#queued)
    this.#queued = 0
    // The turn that comes hands these over too.
    if (this.#isTurning) return
    if (this.#mayTurn) return this.#turn()
    this.#pass()
    // Of what was under way before, something may be done by now: it need not wait to be told.
    this.#take()
    this.#watch()
  }

  get #mayTurn(): boolean {
    return this.#underWay > 0 && this.#pace.maySpin(performance.now())
  }

  /** Hands over what there is, answers what is done, lets all others have their turn, and comes again. */
  readonly #turn = (): void => {
    this.#isTurning = this.#mayTurn
    if (!this.#isTurning) return this.#tell()
    Atomics.store(this.#words, this.#at(CQ.flags), IORING_CQ_EVENTFD_DISABLED)
    if (this.#untaken > 0) this.#enter(this.#untaken)
    this.#take()
    setImmediate(this.#turn)
  }

  /** From now on the thread that waits is told again; what it was not told of is taken. */
  #tell(): void {
    Atomics.store(this.#words, this.#at(CQ.flags), 0)
    this.#pass()
    this.#take()
    // What ended may be the time of the thread that waits.
    if (this.#isWatching && !this.#isTimed) this.#time()
    this.#watch()
  }

  /** Gives the kernel what it has not taken yet. What it cannot take now, for want of memory, it is given again. */
  readonly #pass = (): void => {
    if (this.#untaken > 0) this.#enter(this.#untaken)
    if (this.#untaken > 0) setTimeout(this.#pass, RETRY_MS)
  }

  get #untaken(): number {
    return (this.#load(SQ.tail) - this.#load(SQ.head)) | 0
  }

  /**
   * Has a thread of the pool wait for completions: as long as there is something to come, and some time longer, since it takes a while
   * to wake one. That time is the kernel's own: a thread of JavaScript that dies cannot end the waiting, and is not gone before.
   */
  readonly #watch = (): void => {
    if (this.#isWatching || this.#users === 0) return
    if (!this.#isTimed) {
      if (this.#underWay === 0 && !this.#wasUsed) return
      this.#time()
    }
    this.#isWatching = true
    fs.read(this.#event, this.#told, 0, 8, null, this.#wasTold)
  }

  /** Bounds how long the thread waits. */
  #time(): void {
    this.#isTimed = true
    this.#wasUsed = false
    this.#queue(IORING_OP_TIMEOUT, -1, addressOf(LINGER.buffer), 1, 0, DIRECT_PIECES)
  }

  readonly #wasTold = (): void => {
    this.#isWatching = false
    this.#take()
    // After the answers to those who wait: to wake a thread takes a while.
    setImmediate(this.#watch)
  }

  /** Takes what is done off the completion queue. */
  #take(): void {
    let head = this.#load(CQ.head)
    const tail = this.#load(CQ.tail)
    if (head !== tail) this.#pace.answered(performance.now(), (tail - head) | 0)
    for (; head !== tail; head = (head + 1) | 0) {
      const at = this.#at(CQ.entriesAt) + ((head & this.#mask(CQ.mask)) * CQE_SIZE) / 4
      const place = this.#words[at] as number
      const result = this.#words[at + 2] as number
      Atomics.store(this.#words, this.#at(CQ.head), (head + 1) | 0)
      if (place === DIRECT_PIECES) {
        this.#isTimed = false
        continue
      }
      const moved = this.#waiting[place]
      assert(moved !== undefined, 'a completion belongs to a request')
      this.#waiting[place] = undefined
      this.#free.push(place)
      this.#underWay--
      if (result < 0) moved(systemError(result), 0)
      else moved(null, result)
    }
  }

  /** Where a word of the ring is, by the kernel's answer. */
  #at(word: number): number {
    return (this.#params[word] as number) / 4
  }

  #load(word: number): number {
    return Atomics.load(this.#words, this.#at(word))
  }

  #mask(word: number): number {
    return this.#words[this.#at(word)] as number
  }
}

/** Worded as Node words its own. */
function systemError(errno: number): NodeJS.ErrnoException {
  const code = getSystemErrorName(errno)
  return Object.assign(new Error(`${code}: ${getSystemErrorMessage(errno)}, ring`), { code, errno })
}

let ofThread: IoRing | undefined | null

/** The one of this thread, made when it is first asked for. Undefined where there is none: no koffi, an old kernel, a container's rules. */
export function ioRing(): IoRing | undefined {
  if (ofThread === undefined) {
    try {
      ofThread = koffi === undefined ? null : new IoRing(koffi)
    } catch {
      ofThread = null
    }
  }
  return ofThread ?? undefined
}
