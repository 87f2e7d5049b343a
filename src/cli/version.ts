// The version, from package.json: beside src in a checkout, above dist in a package.

import { readFileSync } from 'node:fs'
import path from 'node:path'

function readVersion(): string {
  for (let folder = import.meta.dirname; ; folder = path.dirname(folder)) {
    try {
      const found = JSON.parse(readFileSync(path.join(folder, 'package.json'), 'utf8')) as { version?: string }
      if (found.version !== undefined) return found.version
    } catch (error) {
      if (folder === path.dirname(folder)) throw error
    }
  }
}

export const VERSION = readVersion()
