// The API as one table: every route with its types and validators. Server, client, command line and dashboard import it; it
// and the tables beside it import nothing but zod at run time.

import { z } from 'zod'
import { bitmap, bitmapEdit, durability } from './bitmap-shapes.ts'
import { hostRoutes } from './host-routes.ts'
import { bytes, job, name, nothing, prove, type Route, terms } from './shapes.ts'
import { viewRoutes } from './view-routes.ts'
import { vmRoutes } from './vm-routes.ts'

/** Edits of bitmaps in one request. */
const EDITS_MAX = 1000

export const errorBody = z.object({ error: z.object({ kind: z.string(), message: z.string() }) })

const layer = z.object({
  path: z.string(),
  format: z.string(),
  snapshot: z.object({ name: z.string(), createdMs: z.number() }).optional(),
  of: z.string().optional().describe('The disk whose layer it is, in a clone'),
})

const cache = z.enum(['writeback', 'none', 'unsafe'])

const disk = z.object({
  name: z.string(),
  state: z.enum(['open', 'failed', 'incoming', 'handed-over', 'moved']),
  migration: z.string().optional().describe('Where it is in a migration, and the command that ends that'),
  error: z.string().optional(),
  size: bytes,
  uri: z.string().optional(),
  layers: z.array(layer),
  bitmaps: z.array(bitmap),
  cache,
  pauses: z
    .object({ count: z.number(), lastMs: z.number(), longestMs: z.number() })
    .optional()
    .describe('How long its guest was held since the disk was opened: by snapshots, moments of backups, pivots'),
  restoring: z
    .object({ repository: z.string(), backup: z.string(), disk: z.string(), away: z.string().optional() })
    .optional()
    .describe('The backup that has what is not here yet, and why its repository cannot be read now'),
  held: z.string().optional().describe('Why it is not served on TCP'),
  note: z.string().optional(),
})

const snapshot = z.object({
  name: z.string(),
  createdMs: z.number(),
  path: z.string(),
  after: z.string().optional().describe('The snapshot that it follows'),
  inChain: z.boolean().describe('Whether the present state of the disk follows it'),
  uri: z.string().optional().describe('Where it is exported, for reading only'),
})

const mirrorMode = z.enum(['auto', 'background', 'write-blocking'])
const finish = z.enum(['copy', 'pivot'])

const migrationToken = z.string().regex(/^[0-9a-f]{32}$/)
const shape = z.object({ name, granule: bytes, recording: z.boolean(), meta: z.string() })
const piece = z.object({ name, first: bytes, bits: z.base64() })
const incomingStep = z.discriminatedUnion('step', [
  z.object({ step: z.literal('state') }),
  z.object({ step: z.literal('freeze'), snapshot: name, createdMs: z.number(), size: bytes }),
  z.object({ step: z.literal('bits'), anew: z.boolean(), shapes: z.array(shape), pieces: z.array(piece) }),
  z.object({
    step: z.literal('seal'),
    shapes: z.array(shape),
    pieces: z.array(piece),
    bitmapsLost: z.object({ atMs: z.number(), reason: z.string() }).optional(),
  }),
  z.object({ step: z.literal('take') }),
  z.object({ step: z.literal('refuse') }),
  z.object({ step: z.literal('release') }),
])
const incomingReply = z.object({
  home: z.string(),
  state: z.enum(['unknown', 'copying', 'sealed', 'taken']),
  snapshots: z.array(z.string()),
})

const onDisk = z.object({ disk: name })
const onSnapshot = z.object({ disk: name, snapshot: name })
const onJob = z.object({ job: name })

export const routes = {
  showStatus: {
    method: 'GET',
    path: '/v1/status',
    summary: 'The daemon: version, process and home',
    params: nothing,
    body: nothing,
    response: z.object({ version: z.string(), pid: z.number(), home: z.string(), node: z.string(), memory: bytes }),
  },
  listDisks: {
    method: 'GET',
    path: '/v1/disks',
    summary: 'All disks',
    params: nothing,
    body: nothing,
    response: z.array(disk),
  },
  addDisk: {
    method: 'POST',
    path: '/v1/disks',
    summary: 'Adds an image as a disk and serves it; with a size, makes the image first',
    params: nothing,
    body: z.object({
      name,
      image: z.string().min(1),
      format: z.enum(['raw', 'qcow2']),
      size: bytes.optional(),
      cache: cache.optional(),
      durability: durability.optional(),
    }),
    response: disk,
  },
  showDisk: {
    method: 'GET',
    path: '/v1/disks/:disk',
    summary: 'One disk with its layers and bitmaps',
    params: onDisk,
    body: nothing,
    response: disk,
  },
  resizeDisk: {
    method: 'POST',
    path: '/v1/disks/:disk/resize',
    summary: 'Makes a disk larger while its guest runs; a client of NBD sees it when it connects the next time',
    params: onDisk,
    body: z.object({ size: bytes }),
    response: disk,
  },
  editBitmaps: {
    method: 'POST',
    path: '/v1/disks/:disk/bitmaps',
    summary: 'Adds, removes, clears, enables, disables, renames and merges bitmaps: at one moment, all or none',
    params: onDisk,
    body: z.object({ edits: z.array(bitmapEdit).min(1).max(EDITS_MAX) }),
    response: disk,
  },
  saveBitmaps: {
    method: 'POST',
    path: '/v1/disks/:disk/saved-bitmaps',
    summary: 'Writes bitmaps into the qcow2 image, where others may use them once the disk was closed cleanly',
    params: onDisk,
    body: z.object({ bitmap: name.optional().describe('This one; unless told, all that are no backup’s or job’s') }),
    response: disk,
  },
  compareBitmaps: {
    method: 'GET',
    path: '/v1/disks/:disk/bitmaps/:first/compared-with/:second',
    summary: 'How two bitmaps differ, in bytes of the disk',
    params: z.object({ disk: name, first: name, second: name }),
    body: nothing,
    response: z.object({ both: bytes, onlyFirst: bytes, onlySecond: bytes }),
  },
  removeDisk: {
    method: 'DELETE',
    path: '/v1/disks/:disk',
    summary: 'Stops serving a disk and forgets it; its images stay',
    params: onDisk,
    body: nothing,
    response: nothing,
  },
  releaseDisk: {
    method: 'POST',
    path: '/v1/disks/:disk/release',
    summary: 'Serves a disk on TCP again that is held since the host stopped uncleanly',
    params: onDisk,
    body: nothing,
    response: nothing,
  },
  listSnapshots: {
    method: 'GET',
    path: '/v1/disks/:disk/snapshots',
    summary: 'The snapshots of a disk, oldest first',
    params: onDisk,
    body: nothing,
    response: z.array(snapshot),
  },
  createSnapshot: {
    method: 'POST',
    path: '/v1/disks/:disk/snapshots',
    summary: 'Freezes the present state of a disk under a name',
    params: onDisk,
    body: z.object({ name }),
    response: snapshot,
  },
  createSnapshots: {
    method: 'POST',
    path: '/v1/snapshots',
    summary: 'Freezes the present state of several disks under a name, of all at one moment or of none',
    params: nothing,
    body: z.object({ disks: z.array(name).min(1), name }),
    response: z.array(snapshot.extend({ disk: name })),
  },
  revert: {
    method: 'POST',
    path: '/v1/disks/:disk/snapshots/:snapshot/revert',
    summary:
      'Makes the disk what a snapshot holds; keeps its present state as a snapshot of the given name, or discards it',
    params: onSnapshot,
    body: z.object({ keep: name.optional() }),
    response: nothing,
  },
  exportSnapshot: {
    method: 'POST',
    path: '/v1/disks/:disk/snapshots/:snapshot/export',
    summary: 'Serves a snapshot over NBD for reading only, until it is unexported',
    params: onSnapshot,
    body: nothing,
    response: z.object({ uri: z.string() }),
  },
  unexportSnapshot: {
    method: 'DELETE',
    path: '/v1/disks/:disk/snapshots/:snapshot/export',
    summary: 'Ends the export of a snapshot; its readers are cut off',
    params: onSnapshot,
    body: nothing,
    response: nothing,
  },
  clone: {
    method: 'POST',
    path: '/v1/disks/:disk/snapshots/:snapshot/clone',
    summary: 'Makes a new disk over a snapshot, whose layers the two then share',
    params: onSnapshot,
    body: z.object({ name, image: z.string().min(1).optional() }),
    response: disk,
  },
  deleteSnapshot: {
    method: 'DELETE',
    path: '/v1/disks/:disk/snapshots/:snapshot',
    summary: 'Deletes a snapshot, as a job: merges its layer with the one above',
    params: onSnapshot,
    body: z.object({
      ...terms,
      direction: z.enum(['auto', 'down', 'up']).default('auto').describe('auto takes the one that copies less'),
    }),
    response: job,
  },
  planCommit: {
    method: 'POST',
    path: '/v1/disks/:disk/commit/plan',
    summary: 'The snapshots that a commit would end',
    params: onDisk,
    body: z.object({ from: name.optional(), to: name.optional() }),
    response: z.object({ ends: z.array(z.string()) }),
  },
  commit: {
    method: 'POST',
    path: '/v1/disks/:disk/commit',
    summary: 'Merges layers down while the guest writes, as a job',
    params: onDisk,
    body: z.object({ from: name.optional(), to: name.optional(), ...terms }),
    response: job,
  },
  planStream: {
    method: 'POST',
    path: '/v1/disks/:disk/stream/plan',
    summary: 'The snapshots that a stream would end',
    params: onDisk,
    body: z.object({ base: name.optional(), to: name.optional() }),
    response: z.object({ ends: z.array(z.string()) }),
  },
  stream: {
    method: 'POST',
    path: '/v1/disks/:disk/stream',
    summary: 'Pulls layers up into the active one, or another, while the guest writes, as a job',
    params: onDisk,
    body: z.object({ base: name.optional(), to: name.optional(), ...terms }),
    response: job,
  },
  mirror: {
    method: 'POST',
    path: '/v1/disks/:disk/mirror',
    summary: 'Copies a disk to a target and keeps it equal while the guest writes, as a job, until that is completed',
    params: onDisk,
    body: z.object({
      target: z.string().min(1).describe('An absolute path, or an NBD URI'),
      format: z.enum(['raw', 'qcow2']).optional().describe('Of a target that is an image'),
      sync: z.enum(['full', 'top', 'none', 'bitmap']).default('full').describe('What is copied at first'),
      bitmap: name.optional(),
      mode: mirrorMode.default('auto'),
      existing: z.boolean().default(false).describe('Writes into what is there'),
      finish: finish.optional().describe('Completes by itself, like that, when it can'),
      ...terms,
    }),
    response: job,
  },
  migrate: {
    method: 'POST',
    path: '/v1/disks/:disk/migrate',
    summary: 'Moves a disk with its snapshots and bitmaps to another daemon while the guest writes, as a job',
    params: onDisk,
    body: z.object({
      target: z.string().min(1).describe('The URI of the other daemon: varve+unix: or varve+tls:'),
      name: name.optional().describe('The name of the disk there; the same unless told'),
      format: z.enum(['raw', 'qcow2']).optional().describe('Of the image that is made there; as here unless told'),
      image: z.string().min(1).optional().describe('Absolute path of the image that is made there'),
      mode: mirrorMode.default('auto'),
      complete: z.boolean().default(true).describe('Switches over as soon as it can; else when the job is completed'),
      forward: z.boolean().default(true).describe('Passes the guests on afterwards; else they are hung up on'),
      ...terms,
    }),
    response: job,
  },
  settleDisk: {
    method: 'POST',
    path: '/v1/disks/:disk/settle',
    summary: 'Ends what a migration left of a disk, by asking the other side; by force without its word',
    params: onDisk,
    body: z.object({ force: z.boolean().default(false) }),
    response: disk,
  },
  prepareIncoming: {
    method: 'POST',
    path: '/v1/incoming',
    summary: 'For another daemon: makes a disk that it will copy one of its own to',
    params: nothing,
    body: z.object({
      protocol: z.number(),
      token: migrationToken,
      disk: name,
      size: bytes,
      format: z.enum(['raw', 'qcow2']),
      image: z.string().min(1).optional(),
      cache,
      home: z.string(),
      from: z.string(),
    }),
    response: incomingReply,
  },
  stepIncoming: {
    method: 'POST',
    path: '/v1/incoming/:token',
    summary: 'For another daemon: a step of the migration with this token',
    params: z.object({ token: migrationToken }),
    body: incomingStep,
    response: incomingReply,
  },
  completeJob: {
    method: 'POST',
    path: '/v1/jobs/:job/complete',
    summary: 'Ends a mirror that is ready: the target stays a copy of that moment, or the disk goes on there',
    params: onJob,
    body: z.object({ finish: finish.default('copy') }),
    response: job,
  },
  setMirrorMode: {
    method: 'POST',
    path: '/v1/jobs/:job/mode',
    summary: 'Changes how a running mirror keeps up with the guest',
    params: onJob,
    body: z.object({ mode: mirrorMode }),
    response: job,
  },
  backup: {
    method: 'POST',
    path: '/v1/backups',
    summary:
      'Takes a moment of one or more disks and copies it into a repository, as a job; answers when the moment is taken',
    params: nothing,
    body: z.object({
      disks: z.array(name).min(1),
      repository: z.string().min(1),
      full: z.boolean().default(false),
      prove,
      since: name.optional().describe('Copies what changed since this checkpoint'),
      checkpoint: name.optional().describe('Its moment becomes this checkpoint'),
      ...terms,
    }),
    response: job,
  },
  restore: {
    method: 'POST',
    path: '/v1/restores',
    summary: 'Makes a disk over a backup and serves it at once; what it lacks comes behind, as a job',
    params: nothing,
    body: z.object({
      name,
      repository: z.string().min(1),
      backup: name,
      disk: name.optional().describe('Which one of the backup, when it has several'),
      image: z
        .string()
        .min(1)
        .optional()
        .describe('Absolute path of its image, which is made; in the home unless told'),
      whenAway: z
        .enum(['hold', 'report'])
        .optional()
        .describe('While the repository is away its guest waits, or is told'),
      cache: cache.optional(),
      ...terms,
    }),
    response: job,
  },
  restoreOnto: {
    method: 'POST',
    path: '/v1/disks/:disk/restore',
    summary: 'Makes a disk what it was in a backup, as a job; it is not served meanwhile',
    params: onDisk,
    body: z.object({
      repository: z.string().min(1),
      backup: name,
      disk: name.optional().describe('Which one of the backup, when it has several'),
      keep: name.optional().describe('The snapshot that its present state becomes; without it that is lost'),
      ...terms,
    }),
    response: job,
  },
  listJobs: {
    method: 'GET',
    path: '/v1/jobs',
    summary: 'Running jobs, then ended ones, newest first, of which those not dismissed may need a look',
    params: nothing,
    body: nothing,
    response: z.array(job),
  },
  showJob: { method: 'GET', path: '/v1/jobs/:job', summary: 'One job', params: onJob, body: nothing, response: job },
  sayToJob: {
    method: 'POST',
    path: '/v1/jobs/:job/:verb',
    summary: 'Says a verb to a running job; which are legal now, its status says',
    params: z.object({ job: name, verb: z.enum(['pause', 'resume', 'cancel', 'finalize']) }),
    body: nothing,
    response: job,
  },
  dismissJob: {
    method: 'DELETE',
    path: '/v1/jobs/:job',
    summary: 'Marks an ended job as seen: from then on only the history has it',
    params: onJob,
    body: nothing,
    response: nothing,
  },
  setJobSpeed: {
    method: 'POST',
    path: '/v1/jobs/:job/speed',
    summary: 'Changes the speed limit of a running job',
    params: onJob,
    body: z.object({ speed: bytes }),
    response: job,
  },
  ...hostRoutes,
  ...viewRoutes,
  ...vmRoutes,
} as const satisfies Record<string, Route>

export type Routes = typeof routes
export type RouteName = keyof Routes
export type Params<K extends RouteName> = z.output<Routes[K]['params']>
export type Body<K extends RouteName> = z.output<Routes[K]['body']>
export type BodyInput<K extends RouteName> = z.input<Routes[K]['body']>
export type Reply<K extends RouteName> = z.output<Routes[K]['response']>

/** A job's progress as server-sent events: one `data:` line of JSON per change, the last one when it ended. */
export const jobEventsPath = (id: string): string => `/v1/jobs/${encodeURIComponent(id)}/events`

export type BitmapEditBody = z.input<typeof bitmapEdit>
export type JobReply = z.output<typeof job>
export type DiskReply = z.output<typeof disk>
