// Elements, text and numbers. Text from a run reaches the page only through `shown`: as text, never as markup.

// Controls but newline and tab, format characters (bidi overrides among them) but the joiners, surrogates, tags:
// what could hide, or turn other text around. The same as rlx.samples.UNSAFE.
const UNSAFE = /[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff\u{110bd}\u{110cd}\u{13430}-\u{1343f}\u{1bca0}-\u{1bca3}\u{1d173}-\u{1d17a}\u{e0000}-\u{e01ef}]/gu;
const MOST_MARKS = 2000;

export function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export function svg(tag, attributes = {}) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

/** `text` as nodes, with what is unsafe written out, such as U+202E. */
export function shown(text) {
  const parts = document.createDocumentFragment();
  let at = 0, marks = 0;
  for (const match of String(text).matchAll(UNSAFE)) {
    parts.append(text.slice(at, match.index));
    const code = `U+${match[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
    parts.append(marks++ < MOST_MARKS ? el("span", { className: "ctl", title: "a character that is not shown as it is" }, code) : `<${code}>`);
    at = match.index + match[0].length;
  }
  parts.append(String(text).slice(at));
  return parts;
}

export function plain(text) {
  return String(text).replace(UNSAFE, (match) => `<U+${match.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}>`);
}

export function number(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 1e6) return `${trim((value / 1e6).toPrecision(3))}M`;
  if (size >= 1e4) return `${trim((value / 1e3).toPrecision(3))}k`;
  if (size < 1e-3) return value.toExponential(1);
  return trim(value.toPrecision(size >= 1000 ? 4 : 3));
}

function trim(text) {
  return text.includes(".") ? text.replace(/\.?0+$/, "") : text;
}

export function duration(seconds) {
  const whole = Math.round(seconds);
  const [h, m, s] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  if (h >= 48) return `${Math.floor(h / 24)} d ${h % 24} h`;
  return h ? `${h} h ${m} min` : m ? `${m} min ${s} s` : `${s} s`;
}

export function clock(unix) {
  return typeof unix === "number" ? new Date(unix * 1000).toLocaleTimeString([], { hour12: false }) : "";
}

export function cleared(element, ...children) {
  element.replaceChildren(...children.filter((child) => child !== null && child !== undefined));
  return element;
}
