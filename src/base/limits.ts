// Every bound of Varve in one place. A queue, cache, buffer or in-flight counter takes its limit from here, so that
// the memory of a daemon can be added up by reading this file.

const KIB = 1024
const MIB = 1024 * KIB

/** Longest time that a loop over data at hand keeps the event loop, in milliseconds. */
export const BREATH_MS = 0.5

/** How long a view stays without a reader unless told, and how often it is looked at whether it broke, in milliseconds. */
export const VIEW_LEASE_MS = 600_000
export const VIEW_LEASE_MAX_MS = 7 * 24 * 3_600_000
export const VIEW_LOOK_MS = 1000

/**
 * A backup keeps what it has so far, for another one to go on from should it break, after so many milliseconds, when it copied so many bytes since;
 * and when it ends without success, when it copied so many.
 */
export const BACKUP_PART_MS = 30_000
export const BACKUP_PART_BYTES = 32 * MIB
export const BACKUP_PART_LAST_BYTES = MIB

/** The most that a proof of a bitmap reads and compares at a time, in bytes. */
export const PROOF_PIECE = 256 * KIB

/** A client that reads views from elsewhere: its connections for each disk, and requests on their way that give a range back. */
export const VIEW_CONNECTIONS = 2
export const VIEW_TRIMS = 16
/** Parts of its lease after which a client shows that it is there, and how often and after how many milliseconds it says again that a backup is whole. */
export const VIEW_BEATS = 4
export const VIEW_COMPLETE_TRIES = 10
export const VIEW_COMPLETE_MS = 1000

/** Smallest and largest granule of a bitmap, in bytes, both QEMU's; 4 KiB unless told. */
export const GRANULE = 4 * KIB
export const GRANULE_MIN = 512
export const GRANULE_MAX = 2048 * MIB
/** Smallest granule of a bitmap that a user adds to a disk, in bytes: a bit for less says little and costs memory. */
export const USER_GRANULE_MIN = 4 * KIB

/** Largest single request of a device, in bytes: what one buffer of the pool holds at most. */
export const REQUEST_MAX = 32 * MIB

/** Smallest pooled buffer, and the most bytes that a thread's pool keeps free for the next request. */
export const POOL_BUFFER_MIN = 4 * KIB
export const POOL_FREE_BYTES = 64 * MIB

/**
 * Files (src/host). Requests that one thread has in Node's pool at once, so many that a disk that is read past the page cache keeps
 * its storage busy; and threads of the pool, of which an idle one takes some 20 KiB.
 */
export const POOL_LANES = 64
export const POOL_THREADS_MAX = 512
/** Part of a thread's requests in the pool that may be syncs, which take longest. */
export const POOL_SYNC_SHARE = 0.25
/** A file is read and written within the call once so many requests took less than so many milliseconds in the pool; a longer one halves the count. */
export const PACE_QUICK_ROW = 16
export const PACE_QUICK_MS = 5
/** What a request within the call may take, in milliseconds: for itself, and for each byte (1 GiB a second). */
export const PACE_CALL_MS = 0.1
export const PACE_BYTE_MS = 1000 / (1024 * MIB)
/** Milliseconds above that which a file may collect before it goes to the pool, and the part of the time that is forgiven. */
export const PACE_DEBT_MS = 10
export const PACE_FORGIVEN = 0.1
/** How long a file then stays in the pool, in milliseconds: at first, and at most, after doubling. */
export const PACE_PAUSE_MIN_MS = 50
export const PACE_PAUSE_MAX_MS = 60_000

/** What goes past the page cache: a page, which it has whole, and the buffers of a thread for it, touched only as far as they are used. */
export const DIRECT_PAGE = 4 * KIB
export const DIRECT_PIECE = 256 * KIB
export const DIRECT_PIECES = 64
/** While requests are under way in the ring the event loop turns, so long in milliseconds without an answer, after so many in a row that came within it. */
export const RING_SPIN_MS = 0.25
export const RING_SPIN_ROW = 16
/**
 * After the answer to a lone request the event loop stays awake so long, in milliseconds, once so many requests in a row came within the gap after
 * the answer before.
 */
export const LINGER_MS = 0.05
export const LINGER_GAP_MS = 0.1
export const LINGER_ROW = 16

/** Longest chain that opens, in layers: more is a mistake or an attack. */
export const CHAIN_LAYERS_MAX = 512

/** Memory of one chain's resolved layer map, in bytes (one byte per cluster), and how much of the disk one look resolves, in units. */
export const LAYER_MAP_BYTES = 16 * MIB
export const LAYER_MAP_PAGE = 4096

/** Pieces of one layer that a look through a chain holds at once. */
export const ALLOCATION_PIECES = 256

/** How long a disk is held for the moment of a backup that another thread makes, in milliseconds; then the backup fails. */
export const REMOTE_FREEZE_MS = 5000
/** A shard that dies is started again after the first of these times, then the second, and so on, in milliseconds. */
export const SHARD_RESTART_MS = [0, 250, 1000, 5000, 30_000] as const

/** How long a drain waits for the requests in flight before it gives up, in milliseconds. */
export const DRAIN_TIMEOUT_MS = 30_000

/** Copy space of one point in time and of all of a host together, in bytes, unless told otherwise. */
export const SCRATCH_BYTES = 4 * 1024 * MIB
export const SCRATCH_HOST_BYTES = 16 * 1024 * MIB
/** Of the latter so much is memory at most, unless told otherwise; taken by the slab, which is also how it goes to a file, in bytes. */
export const SCRATCH_MEMORY_BYTES = 128 * MIB
export const SCRATCH_SLAB = 256 * KIB
/** Granules that a reader takes out of scratch in one turn of the event loop, some 30 µs' worth: guests are answered in between. */
export const SCRATCH_READ_ROW = 16

/** How long after a backup the memory that it let go is given back to the system, once for all that end meanwhile, in milliseconds. */
export const SPARE_MEMORY_MS = 2000

/** Machines that a host may be told to back up at a time, and backups that may be queued. */
export const BACKUP_MACHINES_MAX = 256
export const BACKUPS_QUEUED_MAX = 10_000
/** Least that all backups of a host may be told to copy together, in bytes per second. */
export const HOST_BANDWIDTH_MIN = 64 * KIB
/** How often the queue looks again for scratch that was given back, and for a window that opens or closes, in milliseconds, at most. */
export const QUEUE_LOOK_MS = 1000
export const QUEUE_WINDOW_LOOK_MS = 60_000

/** How long a guest may be frozen for a moment, in milliseconds, unless told, and at most; how long a thaw may take, and the waits until it is tried again. */
export const GUEST_FREEZE_MS = 10_000
export const GUEST_FREEZE_MAX_MS = 600_000
export const GUEST_THAW_MS = 10_000
export const GUEST_THAW_AGAIN_MS = [1000, 5000, 30_000] as const
/** What is kept of what a user's command says, and the longest answer of a guest agent, in bytes. */
export const HOOK_OUTPUT_MAX = 4 * KIB
export const AGENT_REPLY_MAX = 64 * KIB

/** One piece that a copy reads and writes at a time, in bytes. */
export const COPY_PIECE = MIB

/** When no guest of a thread has asked for anything for so many milliseconds, its jobs make haste. */
export const GUESTS_IDLE_MS = 20

/** Requests of a copy that are at least so long are made in the pool. */
export const COPY_POOLED_MIN = 64 * KIB

/** A backup moves less at a time in memory beside a guest, who waits meanwhile: pieces, and what goes into a pack at once. */
export const BACKUP_PIECE = 256 * KIB
export const PACK_TURN_BYTES = 256 * KIB

/** Pieces that a commit copies at once. */
export const COMMIT_LANES = 2
/** And in the pool while no guest asks for anything, beside one within the call; longer ones, since each costs the same besides its bytes. */
export const COMMIT_IDLE_LANES = 3
export const COMMIT_IDLE_PIECE = 2 * MIB
/** A stream has smaller pieces, since a guest's write to a piece waits for it, and more of them at once: they share the syncs. */
export const STREAM_PIECE = 256 * KIB
export const STREAM_LANES = 16

/** Places that guests wait for which a live restore remembers to copy first. */
export const WANTED_PLACES = 256
/** A live restore has larger pieces than a stream, since a repository is read in larger ones; and makes its progress durable less often. */
export const RESTORE_PIECE = MIB / 2
export const RESTORE_LANES = 8
export const RESTORE_SETTLE_BYTES = 256 * MIB
export const RESTORE_SETTLE_MS = 5000
/** The wait between looks for a repository that is away, in milliseconds: at first, and at most, after doubling. */
export const REPOSITORY_RETRY_MIN_MS = 20
export const REPOSITORY_RETRY_MAX_MS = 1000

/** Pieces that a mirror copies at once. */
export const MIRROR_LANES = 4
/** And in the pool while no guest asks for anything: writes into a growing file wait for each other. */
export const MIRROR_IDLE_LANES = 1
/** A mirror in the background is ready when the target is at most so many bytes behind. */
export const MIRROR_BEHIND_BYTES = 16 * MIB
/** How long a mirror's gain on the guest is measured, in milliseconds, and after how many windows in a row without one it does not converge. */
export const MIRROR_WINDOW_MS = 1000
export const MIRROR_LOST_WINDOWS = 3
/** How often a mirror that is ready looks for what to copy, in milliseconds. */
export const MIRROR_LOOK_MS = 100
/** A mirror makes its progress durable after so many bytes or milliseconds: seldom, since it flushes the disk under its guest for that. */
export const MIRROR_SETTLE_BYTES = 128 * MIB
export const MIRROR_SETTLE_MS = 5000
/** How long a target over the network may leave all its requests unanswered before it is given up, in milliseconds: what a guest waits at most. */
export const MIRROR_STALL_MS = 10_000
/** Connections to a target over the network. */
export const MIRROR_CONNECTIONS = 2

/** Pieces that a migration copies at once: over a long line each granule that the guest changed takes a round trip. */
export const MIGRATE_LANES = 32
/** Bits of a bitmap on their way to another daemon, in bytes: a piece, and about the most in one request, as base64. */
export const MIGRATE_BITS_PIECE = 4 * KIB
export const MIGRATE_BITS_BYTES = 256 * KIB
/** The API on TCP: where it is unless told, and its connections at once. */
export const API_DEFAULT_PORT = 10_810
export const API_CONNECTIONS = 256
/** How long another daemon may take to be connected to, in milliseconds. */
export const PEER_CONNECT_MS = 10_000
/** How long another daemon may take to answer, in milliseconds: any question, and those for which a guest waits. */
export const PEER_ANSWER_MS = 30_000
export const PEER_SWITCH_MS = 5000
/** How often a source that has handed over asks again, in milliseconds. */
export const MIGRATE_ASK_MS = 1000
/** The wait between attempts to reach the daemon that guests are passed on to, in milliseconds: at first, and at most, after doubling. */
export const FORWARD_RETRY_MIN_MS = 20
export const FORWARD_RETRY_MAX_MS = 1000

/** A copy makes its progress durable after so many bytes or milliseconds: what a crash has it copy again at most. */
export const CHECKPOINT_BYTES = 64 * MIB
export const CHECKPOINT_MS = 500

/** Ranges that a checkpoint records one by one; when there are more, it is cheaper to write the whole set anew. */
export const CHECKPOINT_RANGES = 1024

/** A limited copy may run ahead of its speed by so many milliseconds' worth. */
export const SPEED_BURST_MS = 100

/** Ended jobs that are remembered. */
export const JOBS_KEPT = 200

/** How long what failed is left alone before a job that ignores errors tries it again, in milliseconds. */
export const ERROR_AGAIN_MS = 1000
/** Pieces in a row that fail before such a job's pass ends: the target is away, not damaged in places. */
export const ERRORS_IN_A_ROW = 16

/**
 * How a copy makes way for the guests (src/job/courtesy.ts), in milliseconds: how long it watches before it changes its pace, and at most
 * when fewer requests than these were answered meanwhile.
 */
export const COURTESY_WINDOW_MS = 100
export const COURTESY_WINDOW_MAX_MS = 500
export const COURTESY_REQUESTS = 16
/** How often it stands still to hear what a request takes without it, how long what is on its way gets to end then, and how long it listens. */
export const COURTESY_LISTEN_EVERY_MS = 10_000
/** And how often when guests have been served so many times what they were when it listened. */
export const COURTESY_LISTEN_AGAIN_MS = 1000
export const COURTESY_OUTDATED = 1.1
export const COURTESY_SETTLE_MS = 50
export const COURTESY_LISTEN_MS = 150
/** How often it asks what the guests of disks in other threads wait for. */
export const COURTESY_ASK_MS = 25
/** What a request may take: so many times what it takes without the job, but at least so many milliseconds. */
export const COURTESY_RATIO = 1.5
/** The same for a live restore, which ends what the guest waits for: that each place it reads for the first time is far away. */
export const COURTESY_RESTORE_RATIO = 4
export const COURTESY_LEAST_MS = 0.3
/** Parts of the fastest pace: by how much it grows in a window, and below which it never goes, so that the job ends. */
export const COURTESY_STEP = 1 / 16
/** The fastest pace is another one after so many windows in a row in which something else than courtesy held the job. */
export const COURTESY_HELD_WINDOWS = 3
export const COURTESY_FLOOR = 1 / 16
/** Bytes a second that it always has. */
export const COURTESY_RATE_LEAST = 256 * KIB
/** The guests ask too much when their thread is at work for this part of the time, with so many requests in a millisecond; or when, at work for the
 * second part, they are served less than a part of what they were without the job. And the floor then. */
export const COURTESY_CROWDED = 0.9
export const COURTESY_CROWD = 2
export const COURTESY_CROWDED_LESS = 0.5
export const COURTESY_SERVED = 0.92
export const COURTESY_CROWDED_FLOOR = 1 / 6
/** Bytes a second that it has all the same then, a small part of what one processor copies; and of a backup, which takes them ten times as long. */
export const COURTESY_CROWDED_LEAST = 192 * MIB
export const COURTESY_BACKUP_LEAST = 16 * MIB

/** A job's rest time is told from so many samples of the last so many milliseconds, once there are some for as long as the last. */
export const REST_WINDOW_MS = 10_000
export const REST_SAMPLES = 40
export const REST_LEAST_MS = 1000

/**
 * NBD, server and client. One connection holds at most a receive buffer, a reply buffer, and `NBD_CONNECTION_BYTES` of
 * data in requests under way and replies that the peer has not taken yet (or one request, when that alone is larger).
 */
export const NBD_RECEIVE_BUFFER = 256 * KIB
export const NBD_REPLY_BUFFER = 256 * KIB
export const NBD_CONNECTION_BYTES = 16 * MIB
/** Requests of one connection that the device has not finished; at this number the server stops reading. */
export const NBD_REQUESTS_IN_FLIGHT = 128
/** A write that is longer than this and has not arrived whole goes to the device in pieces of at least so many bytes, as they arrive. */
export const NBD_WRITE_PIECE = 64 * KIB
/** Connections of one server, the longest option during the handshake in bytes, and the time for a handshake. */
export const NBD_CONNECTIONS = 256
export const NBD_OPTION_MAX = 16 * KIB
export const NBD_HANDSHAKE_MS = 30_000
/** A silent TCP peer is asked after so many milliseconds whether it is still there; one that is gone ends its connection. */
export const NBD_KEEPALIVE_MS = 60_000
/** Largest file of TLS credentials that is read, in bytes. */
export const NBD_CREDENTIALS_MAX = MIB
/** How long a connection that ends waits for the client to take the last replies, in milliseconds. */
export const NBD_DRAIN_MS = 5000
/** Extents in one reply to a block status request, and the largest such reply that a client takes, in bytes. */
export const NBD_STATUS_EXTENTS = 4096
export const NBD_STATUS_REPLY_MAX = 16 * MIB
/** Connections of one client to one export, at most. */
export const NBD_CLIENT_CONNECTIONS = 16
/** Requests that a client has sent on each connection and that wait behind them, and the longest range in one zero, trim or status. */
export const NBD_CLIENT_IN_FLIGHT = 256
export const NBD_CLIENT_WAITING = 65_536
export const NBD_CLIENT_RANGE = 1024 * MIB

// Repositories.

/** Largest pack, before its last blobs and its directory, in bytes. */
export const PACK_BYTES = 16 * MIB
/** Memory that packs are filled in, in bytes a piece; at least as large as the largest blob. */
export const PACK_SLAB = MIB
/** Packs of one backup that are on their way to the store at once; each is in memory until it is durable. */
export const PACKS_IN_FLIGHT = 2
/** An index is written each time so many bytes of a backup became durable. */
export const INDEX_EVERY_BYTES = 256 * MIB
/** New data is hashed and compressed in batches of so many bytes, and so many batches are in memory for each backup. */
export const BATCH_BYTES = MIB
export const BATCHES = 12
/** Runs of data or zeros in one batch. */
export const BATCH_RUNS = 1024
/** Threads of one repository that hash and compress, at most; one more is for what a guest waits for. */
export const SQUEEZE_WORKERS_MAX = 4
/** How long such threads, and the memory of a backup's batches and packs, wait for the next backup, in milliseconds. */
export const REPOSITORY_SPARE_MS = 5000
/** Stored bytes that one read of a repository takes at most, and the gap that it reads over to save a second one. */
export const FETCH_BYTES = MIB
/** What such a read expands to at most, in bytes. */
export const FETCH_PLAIN_BYTES = 2 * MIB
export const FETCH_GAP_BYTES = 64 * KIB
/** Such reads in flight at once for one open backup, beside those that bring no more than so many bytes to somebody who waits for just that. */
export const FETCHES_IN_FLIGHT = 8
export const FETCH_URGENT_BYTES = 128 * KIB
/** Plain data that one open backup keeps, the memory that is taken for it at a time, and how far it reads ahead of a sequential reader, in bytes. */
export const CHUNK_CACHE_BYTES = 32 * MIB
export const CHUNK_SLAB_BYTES = 4 * MIB
export const READ_AHEAD_BYTES = 8 * MIB
/** Where one read of a pack brings less than so many bytes of the disk, it reads ahead up to so far, and keeps three times that. */
export const READ_AHEAD_FETCH = 64 * KIB
export const READ_AHEAD_MAX = 64 * MIB
/** Map nodes (at most 2.3 KiB each) that one reader keeps, and the pieces of packs that they are taken from. */
export const NODE_CACHE_NODES = 4096
export const NODE_WINDOW_BYTES = 128 * KIB
export const NODE_WINDOWS = 64
/** Blobs of one repository, at most: they are numbered in 32 bits. */
export const BLOBS_MAX = 2 ** 32 - 1
/** Blobs whose index is in memory, at 60 bytes each; of those beyond, it is in tables on disk, where there is a folder for them. */
export const MEMORY_BLOBS = 2 ** 20
/** Tables of one repository, before they are joined; the part of their packs that is gone before they are made anew. */
export const TABLES_MAX = 4
export const TABLE_GONE_SHARE = 0.25
/** Pages of tables that one open repository keeps, and the piece in which tables are written and joined, in bytes. */
export const TABLE_CACHE_BYTES = 32 * MIB
export const TABLE_WRITE_BYTES = 256 * KIB
/** Largest manifest or config, in bytes. */
export const SEALED_BYTES_MAX = 16 * MIB
/** How often a session in a repository gives a sign of life, and how long it may give none before a pruning gives it up, in milliseconds. */
export const LEASE_BEAT_MS = 5 * 60_000
export const LEASE_MS = 30 * 60_000
/** The same for who restores a disk out of it live: its daemon may be down meanwhile. */
export const RESTORE_LEASE_MS = 7 * 24 * 3_600_000
/** How long what holds back a session that was given up is kept, in milliseconds. */
export const FENCE_KEPT_MS = 30 * 24 * 3_600_000
/** How long a part of a backup that broke is kept for a later one to go on from, in milliseconds. */
export const PART_KEPT_MS = 7 * 24 * 3_600_000
/** Packs that one mark names, at 35 bytes each: a sealed text must hold them. */
export const MARK_PACKS = 100_000
/** A pruning joins packs that are smaller than this, in bytes, when there are more than so many of them. */
export const SMALL_PACK_BYTES = MIB
export const SMALL_PACKS = 64
/** A pruning writes indexes of at most about so many bytes, and joins those of less than a quarter when there are more than so many. */
export const INDEX_OBJECT_BYTES = 4 * MIB
export const SMALL_INDEXES = 32
/** What a try of a passphrase costs: KiB of memory, passes over them, lanes; and the most memory that a key may ask for. */
export const ARGON_MEMORY_KIB = 64 * KIB
export const ARGON_PASSES = 3
export const ARGON_LANES = 4
export const ARGON_MEMORY_MAX_KIB = 1024 * KIB
/** How often a check or a copy begins anew at most because a pruning has moved what it reads. */
export const STEADY_TRIES = 5
/** How long a request to a store is put off that failed once, twice and so on, in milliseconds; then it has failed. */
export const STORE_RETRY_MS = [100, 500, 2000, 8000] as const
/** Largest file with a passphrase or key that is read, in bytes. */
export const CREDENTIAL_FILE_BYTES_MAX = 4 * KIB
/** Differences between a backup and a disk that are listed; the rest is counted. */
export const DIFFERENCES_MAX = 1000
/** How often a reader of a backup looks whether its blobs have moved when they cannot be read, in milliseconds. */
export const RENEW_EVERY_MS = 10_000
/** Damaged ranges that one verification lists; it counts the rest. */
export const DAMAGED_RANGES_MAX = 10_000
/** One write of a store to a host file, in bytes: what blocks the thread at most. */
export const STORE_WRITE_BYTES = MIB

// qcow2 (src/format/qcow2). The first four are QEMU's own limits, so that an image that we make opens there.
export const QCOW2_L1_MAX = 32 * MIB
export const QCOW2_REFCOUNT_TABLE_MAX = 8 * MIB
export const QCOW2_SNAPSHOTS_MAX = 65_536
export const QCOW2_BITMAPS_MAX = 65_535
/** Bytes of the largest snapshot table or bitmap directory that is read. */
export const QCOW2_DIRECTORY_MAX = 64 * MIB
/** Bytes of the largest bitmap, QEMU's limit, and of all bitmaps of one image that are in memory while it is written. */
export const QCOW2_BITMAP_MAX = 512 * MIB
export const QCOW2_BITMAPS_BYTES = 128 * MIB
/** Bytes of one cached piece of an L2 table or of a refcount block. */
export const QCOW2_SLICE = 16 * KIB
export const QCOW2_REFCOUNT_PAGE = 16 * KIB
/**
 * Bytes of all such pieces of a thread's images together: the L2 entries of 256 GiB at clusters of 64 KiB. Unless told
 * otherwise, and never less than the second, so that each of many requests in flight finds room for what it needs.
 */
export const QCOW2_METADATA_BYTES = 32 * MIB
export const QCOW2_METADATA_MIN = MIB
/** As how many bytes a smaller piece counts: its record, its place in a map and the buffer's own record take memory too. */
export const QCOW2_METADATA_PIECE_MIN = KIB
/** Freed clusters that an image remembers for reuse; those above are found again when it is next opened for writing. */
export const QCOW2_FREED_MAX = 65_536
/** References to a cluster of compressed data that are counted ahead of use where that takes a sync. */
export const QCOW2_COUNTED_AHEAD = 64
/** Clusters that are made ready for use at a time where that takes a sync: at first, and at most, after doubling. */
export const QCOW2_REFILL_MIN = 64
export const QCOW2_REFILL_MAX = 1024
/** Bytes that one copy-on-write step moves at most (a cluster, when that is larger). */
export const QCOW2_COPY = MIB
/**
 * Clusters whose references one walk of a check counts: at one byte each, and four more in pages with clusters that are used
 * more than 14 times. 4 TiB of an image with clusters of 64 KiB.
 */
export const QCOW2_CHECK_WINDOW = 64 * MIB
/** L2 tables that a walk gathers before it reads them, at eight bytes each: those of a disk of 2 PiB at 64 KiB clusters. */
export const QCOW2_CHECK_TABLES = 4 * MIB
/** How far past its end a repair makes a file reach, so that entries whose data is lost lead to no one else's, in bytes. */
export const QCOW2_REPAIR_REACH = 16 * MIB
/** Clusters used for two things that a repair goes on with; an image with more is not written into. */
export const QCOW2_REPAIR_CLASHES = 65_536
/** Findings of a check that are kept as sentences; all are counted. */
export const QCOW2_CHECK_PROBLEMS = 20

// Dirty log (src/dirtylog). After a power loss a bitmap has at most what was written since the last fold but one too much,
// rounded to regions: 2 x 4096 x 4 MiB = 32 GiB at the very most, and usually what the guest writes in 30 seconds.
/** Unit, in bytes, in which the log says durably what is about to be written. A constant of the format. */
export const DIRTYLOG_REGION = 4 * MIB
/** Regions that one epoch names before it ends. */
export const DIRTYLOG_HOT_REGIONS = 4096
/** What part of these, and of the records of an area, a new epoch makes hot at once because they were written lately. */
export const DIRTYLOG_HEAT_SHARE = 0.5
/** Bytes of one of the two log areas of a disk: 131,072 records. */
export const DIRTYLOG_AREA = 4 * MIB
/** So much of an area is memory at a time, in bytes, where the host can have it so. */
export const DIRTYLOG_WINDOW = 256 * KIB
/** Part of a log area that is filled when a fold begins; the rest is for writes while it runs. */
export const DIRTYLOG_FOLD_AT = 0.75
/** Milliseconds from the first record of an epoch to the fold that ends it, and from a failed fold to the next try. */
export const DIRTYLOG_FOLD_MS = 30_000
/** Bytes of bits that a fold copies and writes at once. */
export const DIRTYLOG_PIECE = 256 * KIB
/** Bitmaps of one disk, bytes of a bitmap's name, and bytes of its text and of a log's stamp. */
export const DIRTYLOG_BITMAPS_MAX = 256
export const DIRTYLOG_NAME_MAX = 1023
export const DIRTYLOG_TEXT_MAX = 4 * KIB
/** Bytes of a slot's directory: 256 bitmaps with the longest names and texts, every byte escaped. */
export const DIRTYLOG_DIRECTORY_MAX = 8 * MIB

/** Longest body of an API request and of an answer, in bytes, and how often a job's progress is sent at most. */
export const BODY_BYTES_MAX = MIB
export const REPLY_BYTES_MAX = 64 * MIB
export const EVENTS_EVERY_MS = 100
/** Small requests to a store at once: manifests, indexes, directories. */
export const STORE_REQUESTS = 8

// Partitions and file systems in a backup (src/format/partitions, src/format/ext): what a disk may ask for, whatever it says of itself.
/** Logical partitions in an extended one, and bytes of the array of a GPT. */
export const LOGICAL_PARTITIONS_MAX = 128
export const GPT_ENTRIES_BYTES_MAX = MIB
/** Bytes of a directory, links that a path leads over, and the path of a link, in bytes. */
export const EXT_DIRECTORY_MAX = 64 * MIB
export const EXT_LINKS_MAX = 40
export const EXT_LINK_BYTES_MAX = 4 * KIB
/** Blocks of maps of a file that are kept, and bytes of a file that are read at a time. */
export const EXT_BLOCKS_KEPT = 256
export const EXT_PIECE = MIB

// Offline image tools (src/image).
/** Bytes that a copy or comparison of images moves at a time, when its clusters are not larger: smaller ones wake a sleeping thread more often. */
export const IMAGE_PIECE = MIB
/** Extents of an image that are asked for at a time, and the range in bytes that one such question covers. */
export const IMAGE_WALK_PIECES = 256
export const IMAGE_WALK_BYTES = 4 * 1024 * MIB
/** Pieces at work at once, at most and unless told. */
export const IMAGE_LANES_MAX = 16
export const IMAGE_LANES = 4
/** Threads that compress clusters, at most. */
export const IMAGE_COMPRESSING_MAX = 8
/** Unreadable ranges that a salvaging conversion lists; it counts the rest. */
export const IMAGE_LOST_RANGES_MAX = 1000
/** Longest run of zeros that the option for it can ask for, in bytes. */
export const IMAGE_SPARSE_MAX = 16 * MIB
