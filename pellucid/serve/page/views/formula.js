// A formula in words, such as `q[12,64] · kᵀ / √D`, as MathML with the shapes under the names.

import { html } from "../html.js";

const MATHML = html`<math></math>`.namespaceURI;
const PIECES = /([A-Za-zα-ωΔθσμγβ][\w.]*'?)(\[[\d\w/,×: ]*\])?|(\d[\d.,]*(?:e[-+]?\d+)?)|(√)|([ᵀ²³])|(\s+)|(.)/gu;
/** @type {Record<string, string>} */
const RAISED = { "ᵀ": "T", "²": "2", "³": "3" };

/**
 * @param {string} text
 * @returns {Node}
 */
export function formula(text) {
  /** @type {any[]} */
  const parts = [];
  let underRoot = false;
  const add = (/** @type {any} */ node) => {
    parts.push(underRoot ? rooted(node) : node);
    underRoot = false;
  };
  for (const [, name, shape, number, root, raised, space, other] of text.matchAll(PIECES)) {
    if (name) add(named(name, shape));
    else if (number) add(element("mn", number));
    else if (root) underRoot = true;
    else if (raised) parts.push(raise(parts.pop(), RAISED[raised]));
    else if (space) continue;
    else if (other) parts.push(element("mo", other === "-" ? "−" : other));
  }
  const math = element("math", "");
  math.append(inRow(parts));
  return math;
}

/** @param {string} tag @param {string} text */
function element(tag, text) {
  const made = document.createElementNS(MATHML, tag);
  if (text) made.textContent = text;
  return made;
}

/** @param {Node} node */
function rooted(node) {
  const root = element("msqrt", "");
  root.append(node);
  return root;
}

/** @param {any[]} parts */
function inRow(parts) {
  const row = element("mrow", "");
  for (const part of parts) row.append(part);
  return row;
}

/** @param {string} name @param {string | undefined} shape */
function named(name, shape) {
  const short = element("mi", name.replace(/^layers\.\d+\./, ""));
  if (name.length > 1) short.setAttribute("mathvariant", "normal");
  if (!shape) return short;
  const under = element("munder", "");
  under.append(short, element("mtext", shape.slice(1, -1).replaceAll(",", "×").replaceAll(" ", "")));
  return under;
}

/** @param {any} base @param {string} text */
function raise(base, text) {
  const raised = element("msup", "");
  raised.append(base ?? element("mrow", ""), element(text === "T" ? "mi" : "mn", text));
  return raised;
}
