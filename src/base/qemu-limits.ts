// The limits of what is said to QEMU and to libvirt about the machines that run there; all others are in limits.ts.

const KIB = 1024
const MIB = 1024 * KIB

/** QEMU's monitor (src/source/qemu): milliseconds until it greets and until it answers, commands under way, and bytes of its longest line. */
export const QMP_GREETING_MS = 5000
export const QMP_COMMAND_MS = 60_000
export const QMP_COMMANDS_MAX = 64
export const QMP_REPLY_MAX = 64 * MIB
/** How long a guest's write waits for its old data to be saved, in seconds, before the moment breaks in its place. */
export const QMP_MOMENT_CBW_S = 10
/** How long `varve vm` waits for a monitor's greeting, in milliseconds. */
export const QMP_LOOK_MS = 3000
/** Bitmaps in QEMU are as fine as ours on disks of up to so many bytes, else of this granularity; least scratch of a disk that is worth a try. */
export const QMP_BITMAP_FINE_MAX = 4 * 1024 * 1024 * MIB
export const QMP_BITMAP_COARSE = 64 * KIB
export const QMP_SCRATCH_MIN = 4 * MIB
/** The waits until it is tried again to clean up after a backup, in milliseconds, when its monitor does not answer; after the last it is left. */
export const QMP_SETTLE_AGAIN_MS = [1000, 5000, 0] as const
/** How long an export of QEMU's may take to end, and how often that is looked at, in milliseconds. */
export const QMP_EXPORT_GONE_MS = 30_000
export const QMP_EXPORT_LOOK_MS = 10
/** How often the progress of QEMU's own mirror is looked at, in milliseconds. */
export const QMP_MOVE_LOOK_MS = 100

/** libvirt's virsh (src/source/libvirt): milliseconds that a command may take, characters of the longest answer, and how deep its XML may be. */
export const VIRSH_MS = 60_000
export const VIRSH_REPLY_MAX = 16 * MIB
export const VIRSH_XML_DEPTH_MAX = 64
/** How long a backup job may take to end, and how often that is looked at, in milliseconds. */
export const VIRSH_JOB_GONE_MS = 30_000
export const VIRSH_JOB_LOOK_MS = 50
/** How often it is looked at how much scratch libvirt's backup job takes, in milliseconds. */
export const VIRSH_SCRATCH_LOOK_MS = 500
