// Snapshots as a tree: each is drawn below the one that it follows, the oldest first.
//
//   monday
//   ├─ tuesday
//   │  └─ wednesday
//   └─ before-revert

interface Node {
  readonly name: string
  readonly after?: string | undefined
}

/** The snapshots in the order of the tree, each with its name as it is drawn there. */
export function snapshotTree<T extends Node>(
  snapshots: readonly T[],
): { readonly drawn: string; readonly snapshot: T }[] {
  const names = new Set(snapshots.map(({ name }) => name))
  const below = (parent: string | undefined, indent: string): { drawn: string; snapshot: T }[] => {
    const children = snapshots.filter(
      ({ after }) => (after !== undefined && names.has(after) ? after : undefined) === parent,
    )
    return children.flatMap((snapshot, index) => {
      const isLast = index === children.length - 1
      const isRoot = parent === undefined
      const own = isRoot ? '' : `${indent}${isLast ? '└─ ' : '├─ '}`
      const under = isRoot ? '' : `${indent}${isLast ? '   ' : '│  '}`
      return [{ drawn: `${own}${snapshot.name}`, snapshot }, ...below(snapshot.name, under)]
    })
  }
  return below(undefined, '')
}
