// Reads a socket into a Receiver. For sockets of Node's own kind the kernel writes straight into the receiver's room (`onread`);
// any other stream (TLS) is copied from its data events.

import net from 'node:net'
import type { Duplex } from 'node:stream'
import { copyBytes } from '../base/bytes.ts'
import type { Receiver } from './receiver.ts'

/** Called after bytes arrived; false stops the reading until `resume` of the socket. */
export type Arrival = () => boolean

/** Options for a new net.Socket that reads into the receiver. */
export function onreadInto(receiver: Receiver, arrival: Arrival): net.OnReadOpts {
  return {
    buffer: () => receiver.room(),
    callback: (count) => {
      receiver.arrived(count)
      return arrival()
    },
  }
}

interface WithHandle {
  _handle: unknown
}

/**
 * Takes over a paused socket that a server accepted, and returns the one to use instead. Node offers `onread` only to
 * sockets that it makes itself, so the accepted connection is handed to a new one; the field is not a documented one,
 * and where it is missing the data events serve, at the price of an allocation and a copy per read.
 */
export function takeAccepted(accepted: net.Socket, receiver: Receiver, arrival: Arrival): net.Socket {
  const handle = (accepted as net.Socket & Partial<WithHandle>)._handle
  if (handle === undefined || handle === null) {
    readByEvents(accepted, receiver, arrival)
    return accepted
  }
  ;(accepted as net.Socket & WithHandle)._handle = null
  const options = { handle, allowHalfOpen: true, onread: onreadInto(receiver, arrival) }
  return new net.Socket(options as net.SocketConstructorOpts)
}

/**
 * The plain way: copies each chunk into the receiver; what is not wanted yet goes back to the stream. Returns how to end it.
 */
export function readByEvents(socket: Duplex, receiver: Receiver, arrival: Arrival): () => void {
  const read = (chunk: Uint8Array): void => {
    let done = 0
    while (done < chunk.length) {
      const room = receiver.room()
      // Nobody takes what arrives: going on would be for ever.
      if (room.length === 0) return void socket.destroy()
      const count = Math.min(room.length, chunk.length - done)
      copyBytes(chunk, done, room, 0, count)
      done += count
      receiver.arrived(count)
      if (arrival()) continue
      socket.pause()
      if (done < chunk.length) socket.unshift(chunk.subarray(done))
      return
    }
  }
  socket.on('data', read)
  return () => void socket.off('data', read)
}
