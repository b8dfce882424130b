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
  const math = element("math", "");
  math.append(sequence([...text.matchAll(PIECES)]));
  return math;
}

/**
 * Pieces up to the end, or up to the parenthesis that closes.
 * @param {RegExpMatchArray[]} pieces taken from the front
 * @param {boolean} [inside]
 */
function sequence(pieces, inside = false) {
  const row = element("mrow", "");
  let afterWord = false;
  while (pieces.length) {
    const [whole, name, shape, number, root, raised, space, other] = /** @type {RegExpMatchArray} */ (pieces.shift());
    if (inside && whole === ")") break;
    if (space) continue;
    if (name && afterWord) row.append(gap());
    afterWord = Boolean(name || number || other === ",");
    if (name) row.append(named(name, shape));
    else if (number) row.append(element("mn", number));
    else if (root) row.append(rooted(pieces));
    else if (raised) row.append(raise(row.lastChild, RAISED[raised]));
    else row.append(element("mo", other === "-" ? "−" : other));
  }
  return row;
}

/** Space between words: formulas here are half prose. */
function gap() {
  const space = element("mspace", "");
  space.setAttribute("width", "0.28em");
  return space;
}

/** The root of what follows: a parenthesis or one piece. @param {RegExpMatchArray[]} pieces */
function rooted(pieces) {
  const root = element("msqrt", "");
  if (pieces[0]?.[0] !== "(") root.append(sequence(pieces.splice(0, 1)));
  else {
    pieces.shift();
    root.append(sequence(pieces, true));
  }
  return root;
}

/** @param {string} tag @param {string} text */
function element(tag, text) {
  const made = document.createElementNS(MATHML, tag);
  if (text) made.textContent = text;
  return made;
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
