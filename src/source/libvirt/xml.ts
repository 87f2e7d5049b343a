// As much of XML as libvirt prints and takes: elements, attributes, text, character references. No document type, no namespaces, and text between
// elements is joined. Whatever else it meets it refuses: nothing is guessed.

import { VIRSH_XML_DEPTH_MAX } from '../../base/qemu-limits.ts'
import { BlockError } from '../../block/error.ts'

export interface XmlElement {
  readonly name: string
  readonly attributes: ReadonlyMap<string, string>
  readonly children: readonly XmlElement[]
  /** Its own text, without that of its children, trimmed. */
  readonly text: string
}

/** An element that is not closed yet. */
interface Open {
  readonly name: string
  readonly attributes: ReadonlyMap<string, string>
  readonly children: XmlElement[]
  text: string
}

const SKIPPED = /(?:<!--[^]*?-->|<\?[^]*?\?>)/y
const TAG = /<(\/?)([A-Za-z_][\w:.-]*)((?:\s+[\w:.-]+\s*=\s*(?:"[^"<]*"|'[^'<]*'))*)\s*(\/?)>/y
const TEXT = /[^<]+/y
const ATTRIBUTE = /([\w:.-]+)\s*=\s*(?:"([^"]*)"|'([^']*)')/g
const NAMED: Readonly<Record<string, string>> = { lt: '<', gt: '>', amp: '&', quot: '"', apos: "'" }

/** The one element that the text is. Kind 'protocol' for what is no XML, or more of it than libvirt has. */
export function parseXml(text: string): XmlElement {
  const root: Open = { name: '', attributes: new Map(), children: [], text: '' }
  const open: Open[] = [root]
  let at = 0
  const next = (pattern: RegExp): RegExpExecArray | null => {
    pattern.lastIndex = at
    const found = pattern.exec(text)
    at += found?.[0].length ?? 0
    return found
  }
  while (at < text.length) {
    const inner = open.at(-1) as Open
    if (next(SKIPPED) !== null) continue
    const words = next(TEXT)
    if (words !== null) {
      inner.text += unescape(words[0])
      continue
    }
    const tag = next(TAG)
    if (tag === null) throw noXml(`what is at character ${at}: ${JSON.stringify(text.slice(at, at + 40))}`)
    const [, closes, name = '', attributes = '', isEmpty] = tag
    if (closes === '/') {
      if (open.length === 1 || inner.name !== name) throw noXml(`</${name}> closes <${inner.name}>`)
      open.pop()
      ;(open.at(-1) as Open).children.push(closed(inner))
      continue
    }
    const element = { name, attributes: attributesOf(attributes), children: [], text: '' }
    if (isEmpty === '/') inner.children.push(element)
    else if (open.push(element) > VIRSH_XML_DEPTH_MAX) throw noXml('its elements are nested too deep')
  }
  const [only, ...others] = root.children
  if (open.length > 1 || only === undefined || others.length > 0 || root.text.trim() !== '')
    throw noXml(open.length > 1 ? `<${open.at(-1)?.name}> is not closed` : 'it is not one element')
  return only
}

/** The first child of that name. */
export function childOf(element: XmlElement | undefined, name: string): XmlElement | undefined {
  return element?.children.find((child) => child.name === name)
}

/** The children of that name, of the child `of`. */
export function childrenIn(element: XmlElement, of: string, name: string): readonly XmlElement[] {
  return childOf(element, of)?.children.filter((child) => child.name === name) ?? []
}

/** An element with attributes, those that are undefined left out, and what is in it, which is XML. */
export function xml(name: string, attributes: Readonly<Record<string, string | undefined>>, inner = ''): string {
  const said = Object.entries(attributes).flatMap(([key, value]) =>
    value === undefined ? [] : [` ${key}='${escapeXml(value)}'`],
  )
  return inner === '' ? `<${name}${said.join('')}/>` : `<${name}${said.join('')}>${inner}</${name}>`
}

export function escapeXml(text: string): string {
  return text.replaceAll(/[<>&"']/g, (letter) => `&#${letter.codePointAt(0)};`)
}

function closed({ text, ...element }: Open): XmlElement {
  return { ...element, text: text.trim() }
}

function attributesOf(text: string): ReadonlyMap<string, string> {
  return new Map([...text.matchAll(ATTRIBUTE)].map(([, key = '', a, b]) => [key, unescape(a ?? b ?? '')]))
}

function unescape(text: string): string {
  return text.replaceAll(/&(?:(#x[0-9a-fA-F]{1,6}|#\d{1,7}|\w+);)?/g, (_whole, said: string = '') => {
    const code = said.startsWith('#x') ? Number.parseInt(said.slice(2), 16) : Number(said.slice(1))
    const letter = said.startsWith('#') ? (code <= 0x10_ff_ff ? String.fromCodePoint(code) : undefined) : NAMED[said]
    if (letter === undefined) throw noXml(`&${said} is no character`)
    return letter
  })
}

function noXml(what: string): BlockError {
  return new BlockError('protocol', `this is not the XML that libvirt writes: ${what}`)
}
