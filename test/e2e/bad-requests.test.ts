// Requests that cannot be done as asked: wrong names, sizes, options and verbs, things that do not exist or are in use. Each
// gets one line and its exit status, and leaves everything as it was.

import assert from 'node:assert/strict'
import fs from 'node:fs'
import { after, before, test } from 'node:test'
import { beginCommand, checkRefusal, MIB, Site, STATUS } from '../support/site.ts'

let site: Site

before(async () => {
  site = await Site.start()
  await site.disk('vm1', '32M')
  await site.disk('single', '4M')
  await site.done('snapshot', 'create', 'vm1', 'first')
})
after(() => site.end())

interface Refusal {
  /** The sentence that is tested. */
  readonly name: string
  /** What is typed; @ stands for the site's folder, REPO for its repository. */
  readonly line: string
  readonly status: number
  readonly says: RegExp
}

const { usage, notFound, busy, failed } = STATUS

const REFUSALS: readonly Refusal[] = [
  { name: 'an unknown command', line: 'frobnicate', status: usage, says: /unknown command 'frobnicate'/ },
  { name: 'an unknown command with a suggestion', line: 'disc list', status: usage, says: /Did you mean disk/ },
  { name: 'an unknown command of a group', line: 'disk frobnicate', status: usage, says: /unknown command/ },
  { name: 'an unknown option', line: 'disk list --nope', status: usage, says: /unknown option '--nope'/ },
  { name: 'an argument too many', line: 'disk list extra', status: usage, says: /too many arguments/ },
  { name: 'a disk to add without a format', line: 'disk add d @/a.raw', status: usage, says: /--format/ },
  { name: 'a format that Varve does not know', line: 'disk add d @/a -f vmdk', status: usage, says: /raw, qcow2/ },
  { name: 'a backup without a repository', line: 'backup vm1', status: usage, says: /--repo/ },
  {
    name: 'a backup of no disk',
    line: 'backup --repo REPO',
    status: usage,
    says: /name machines to back up, or say --all/,
  },
  {
    name: 'a disk name that is a path',
    line: 'disk add ../d @/a -f raw',
    status: usage,
    says: /disk name "\.\.\/d": use/,
  },
  { name: 'an empty disk name', line: "disk show ''", status: usage, says: /disk/ },
  {
    name: 'a snapshot name with a slash',
    line: 'snapshot create vm1 a/b',
    status: usage,
    says: /snapshot name "a\/b"/,
  },
  {
    name: 'a size that is none',
    line: 'disk create d @/d -f raw --size 4x',
    status: usage,
    says: /"4x" is not a size/,
  },
  { name: 'a negative size', line: 'disk create d @/d -f raw --size -4', status: usage, says: /"-4" is not a size/ },
  { name: 'a size beyond numbers', line: 'disk create d @/d -f raw --size 9P', status: usage, says: /is not a size/ },
  { name: 'a size beyond qcow2', line: 'disk create d @/d -f qcow2 --size 7P', status: usage, says: /needs clusters/ },
  { name: 'a speed that is none', line: 'commit vm1 -y --speed fast', status: usage, says: /"fast" is not a size/ },
  { name: 'a port that is none', line: 'nbd @/a -f raw --port 65536', status: usage, says: /"65536" is not a port/ },
  { name: 'a disk twice in a backup', line: 'backup vm1 vm1 --repo REPO', status: usage, says: /vm1 is named twice/ },
  { name: 'a commit without snapshots', line: 'commit single', status: usage, says: /nothing to commit/ },
  { name: 'a commit upward', line: 'commit vm1 -y --from base --to active', status: usage, says: /not below/ },
  {
    name: 'a commit that was not agreed to',
    line: 'commit vm1',
    status: usage,
    says: /ends the snapshots first.*--yes/,
  },
  { name: 'a stream without snapshots', line: 'stream single', status: usage, says: /nothing to stream/ },
  {
    name: 'a stream downward',
    line: 'stream vm1 -y --base active --to first',
    status: usage,
    says: /nothing to stream/,
  },
  {
    name: 'a stream that was not agreed to',
    line: 'stream vm1',
    status: usage,
    says: /This stream of vm1 ends the snapshots first.*--yes/,
  },
  {
    name: 'a revert that was not agreed to',
    line: 'snapshot revert vm1 first',
    status: usage,
    says: /changes disk vm1 under whoever uses it and keeps .* as before-first-.*--yes/,
  },
  {
    name: 'a revert that keeps and discards',
    line: 'snapshot revert vm1 first -y --discard --keep-as x',
    status: usage,
    says: /--discard or --keep-as, not both/,
  },
  {
    name: 'a revert to nothing',
    line: 'snapshot revert vm1 nope -y',
    status: notFound,
    says: /no snapshot nope: varve snapshot list vm1/,
  },
  { name: 'a folder as an image', line: 'disk add d @ -f raw', status: usage, says: /directory/ },
  { name: 'an unknown disk', line: 'disk show nope', status: notFound, says: /no disk nope: varve disk list/ },
  { name: 'a disk name beyond any', line: `disk show ${'x'.repeat(500)}`, status: notFound, says: /no disk x+:/ },
  { name: 'a disk name that is a parent folder', line: 'disk show ..', status: notFound, says: /no disk \.\./ },
  {
    name: 'an unknown disk to back up',
    line: 'backup nope --repo REPO',
    status: notFound,
    says: /no machine or disk nope/,
  },
  {
    name: 'an unknown disk to snapshot',
    line: 'snapshot create nope',
    status: notFound,
    says: /no machine or disk nope/,
  },
  { name: 'an unknown disk to remove', line: 'disk remove nope', status: notFound, says: /no disk nope/ },
  { name: 'an unknown snapshot', line: 'snapshot delete vm1 nope', status: notFound, says: /no snapshot nope/ },
  {
    name: 'an unknown layer',
    line: 'commit vm1 --from nope',
    status: notFound,
    says: /layers are base, first, active/,
  },
  { name: 'an unknown job', line: 'job show nope', status: notFound, says: /no job nope: varve job list/ },
  { name: 'a verb to an unknown job', line: 'job cancel nope', status: notFound, says: /no job nope/ },
  {
    name: 'an image that does not exist',
    line: 'disk add d @/no -f raw',
    status: notFound,
    says: /\/no does not exist/,
  },
  { name: 'an image in no folder', line: 'disk create d @/no/d -f raw --size 1M', status: notFound, says: /\/no\/d/ },
  { name: 'a folder that is no repository', line: 'repo list @', status: notFound, says: /varve repo init/ },
  { name: 'a file as a repository', line: 'repo list @/vm1.qcow2', status: notFound, says: /is no repository/ },
  { name: 'a backup to no repository', line: 'backup vm1 --repo @/no', status: notFound, says: /varve repo init/ },
  { name: 'an unknown backup to verify', line: 'verify nope --repo REPO', status: notFound, says: /no backup nope/ },
  {
    name: 'an unknown backup to restore',
    line: 'restore nope --repo REPO --to @/r',
    status: notFound,
    says: /no backup/,
  },
  { name: 'a repository made twice', line: 'repo init REPO', status: busy, says: /is a repository already/ },
  { name: 'a repository among other files', line: 'repo init @', status: busy, says: /is not empty/ },
  { name: 'a repository in a file', line: 'repo init @/vm1.qcow2', status: busy, says: /is no folder/ },
  {
    name: 'a disk name in use',
    line: 'disk add vm1 @/a -f raw',
    status: busy,
    says: /a disk vm1 already: varve disk show/,
  },
  {
    name: 'a new image over a file',
    line: 'disk create d @/vm1.qcow2 -f raw --size 1M',
    status: busy,
    says: /already/,
  },
  { name: 'a snapshot name in use', line: 'snapshot create vm1 first', status: busy, says: /a snapshot first already/ },
  { name: 'an image of the daemon served by another', line: 'nbd @/vm1.qcow2 -f qcow2', status: busy, says: /in use/ },
  { name: 'a second daemon on one home', line: 'serve', status: busy, says: /another varve serve has the home/ },
  {
    name: 'a repository that is a URL',
    line: 'backup vm1 --repo s3://a/b',
    status: failed,
    says: /s3: is not supported/,
  },
]

for (const { name, line, status, says } of REFUSALS) {
  test(`${name} is refused with status ${status}, and nothing changes`, async () => {
    const stateBefore = await site.state()
    const filesBefore = fs.readdirSync(site.folder)
    const typed = line.replaceAll('@', site.folder).replaceAll('REPO', site.repository)
    await site.refuses(
      typed.split(' ').map((word) => (word === "''" ? '' : word)),
      status,
      says,
    )
    assert.deepEqual(await site.state(), stateBefore)
    assert.deepEqual(fs.readdirSync(site.folder), filesBefore)
  })
}

test('an error is one line of JSON where JSON was asked for', async () => {
  const line = await site.refuses(['disk', 'show', 'nope', '--json'], notFound, /^\{/)
  const { error } = JSON.parse(line) as { error: { kind: string; message: string } }
  assert.equal(error.kind, 'not-found')
  assert.match(error.message, /no disk nope/)
})

test('restore never writes over a file, nor over what another restore left', async () => {
  const said = JSON.parse(await site.done('backup', 'single', '--repo', site.repository, '--json')) as {
    details: { backup: string }
  }
  const restore = ['restore', said.details.backup, '--repo', site.repository, '--to', site.path('r.raw')]
  for (const [file, says] of [
    ['r.raw', /r\.raw is there already/],
    ['r.raw.partial', /r\.raw\.partial is there/],
  ] as const) {
    fs.writeFileSync(site.path(file), 'mine')
    await site.refuses(restore, busy, says)
    assert.equal(fs.readFileSync(site.path(file), 'utf8'), 'mine')
    fs.rmSync(site.path(file))
  }
  await site.refuses([...restore, '--disk', 'nope'], notFound, /no disk nope; it has single/)
  await site.done(...restore)
  assert.equal(fs.statSync(site.path('r.raw')).size, 4 * MIB)
})

test('what a running job forbids is refused with its name, and the job goes on', async () => {
  const guest = await site.guest('vm1')
  const block = Buffer.alloc(MIB, 7)
  for (let at = 0; at < 16; at++) await guest.write(at * MIB, MIB, block, 0, 0)
  await guest.close()
  const started = await site.done('commit', 'vm1', '--yes', '--no-wait', '--speed', '100K', '--json')
  const { id } = JSON.parse(started) as { id: string }
  await site.job(id, ({ state }) => state === 'running')
  const stateBefore = await site.state()
  await site.refuses(['snapshot', 'create', 'vm1', 'second'], busy, new RegExp(`has to wait: job ${id}`))
  await site.refuses(['commit', 'vm1', '--yes'], busy, new RegExp(id))
  await site.refuses(['snapshot', 'revert', 'vm1', 'first', '-y'], busy, new RegExp(`revert has to wait: job ${id}`))
  await site.refuses(['stream', 'vm1', '--yes'], busy, new RegExp(`stream has to wait: job ${id}`))
  await site.refuses(['disk', 'remove', 'vm1'], busy, new RegExp(`varve job cancel ${id}`))
  await site.refuses(['job', 'resume', id], busy, /is running: resume cannot be said now; what can: pause, cancel/)
  await site.done('job', 'pause', id)
  await site.refuses(['job', 'pause', id], busy, /is paused: pause cannot be said now; what can: resume, cancel/)
  await site.done('job', 'resume', id)
  assert.deepEqual(await site.state(), stateBefore)
  await site.done('job', 'set-speed', id, '0')
  await site.job(id, ({ endedMs, error }) => endedMs !== undefined && error === undefined)
  for (const verb of ['pause', 'resume', 'cancel']) await site.refuses(['job', verb, id], busy, /has ended/)
  await site.refuses(['job', 'set-speed', id, '1M'], busy, /has ended/)
})

test('a cancelled job says so to whoever follows it, and changed nothing', async () => {
  await site.done('snapshot', 'create', 'single', 's')
  const guest = await site.guest('single')
  await guest.write(0, MIB, Buffer.alloc(MIB, 9), 0, 0)
  await guest.close()
  const follower = site.begin('commit', 'single', '--yes', '--speed', '10K')
  const [job] = await waitFor(async () => {
    const jobs = await site.daemon.api.call('listJobs', {}, {})
    return jobs.filter(({ subject, state }) => subject === 'single' && state === 'running')
  })
  await site.done('job', 'cancel', job?.id ?? '')
  checkRefusal(['commit', 'single'], await follower.ended, failed, /was cancelled/)
  const { layers } = await site.daemon.api.call('showDisk', { disk: 'single' }, {})
  assert.equal(layers.length, 2)
})

test('every command that needs the daemon says that none runs, and how to start one', async () => {
  const lines = [
    'disk list',
    'disk remove d',
    'snapshot list d',
    'commit d',
    'stream d',
    'backup d --repo REPO',
    'job list',
  ]
  const outcomes = lines.map(async (line) => {
    const args = [...line.replace('REPO', site.repository).split(' '), '--home', site.path('nobody-home')]
    checkRefusal(args, await beginCommand(args).ended, notFound, /no daemon listens at .*varve serve.*--home/)
  })
  await Promise.all(outcomes)
  assert.equal(fs.existsSync(site.path('nobody-home')), false)
})

async function waitFor<T>(ask: () => Promise<readonly T[]>): Promise<readonly T[]> {
  for (;;) {
    const found = await ask()
    if (found.length > 0) return found
    await new Promise((resolve) => setTimeout(resolve, 20))
  }
}
