// Elements from template literals. What is put in between is never parsed as markup: text becomes a
// text node, so a prompt cannot become code. A function or a signal in between is read again
// when what it reads changes. `@click` listens, `.value` sets a property, `css` sets the style (the page's
// security policy forbids style attributes), false and null leave an attribute out.

import { effect } from "./signals.js";

/** @typedef {{template: HTMLTemplateElement, names: string[]}} Prepared */
/** @type {Map<TemplateStringsArray, Prepared>} */
const prepared = new Map();
const MARK = "pellucid-slot-";

/**
 * @param {TemplateStringsArray} strings
 * @param {boolean} drawing
 * @returns {Prepared}
 */
function prepare(strings, drawing) {
  const known = prepared.get(strings);
  if (known) return known;
  /** @type {string[]} */
  const names = [];
  let text = "";
  strings.forEach((piece, i) => {
    text += piece;
    if (i === strings.length - 1) return;
    if (text.lastIndexOf("<") <= text.lastIndexOf(">")) {
      text += `<!--${MARK}${i}-->`;
      return;
    }
    // The attribute takes another name, so that no parser complains about a mark as its value.
    const found = /\s([^\s"'<>=]+)=$/.exec(text);
    if (!found) throw new Error(`html: a value must be a whole attribute, without quotes: ${piece}`);
    names[i] = found[1];
    text = `${text.slice(0, found.index)} ${MARK}${i}`;
  });
  const template = document.createElement("template");
  template.innerHTML = drawing ? `<svg>${text}</svg>` : text;
  if (drawing) template.content.replaceChildren(...template.content.children[0].childNodes);
  const made = { template, names };
  prepared.set(strings, made);
  return made;
}

/**
 * A fragment, or the element where there is one only.
 * @param {TemplateStringsArray} strings
 * @param {...any} values
 * @returns {any}
 */
export function html(strings, ...values) {
  return build(strings, values, false);
}

/**
 * The same for what stands inside an <svg>.
 * @param {TemplateStringsArray} strings
 * @param {...any} values
 * @returns {any}
 */
export function svg(strings, ...values) {
  return build(strings, values, true);
}

/**
 * @param {TemplateStringsArray} strings
 * @param {any[]} values
 * @param {boolean} drawing
 */
function build(strings, values, drawing) {
  const { template, names } = prepare(strings, drawing);
  const content = document.importNode(template.content, true);
  const walker = document.createTreeWalker(content, NodeFilter.SHOW_ELEMENT | NodeFilter.SHOW_COMMENT);
  /** @type {(() => void)[]} */
  const work = [];
  while (walker.nextNode()) {
    const node = walker.currentNode;
    if (node instanceof Element) {
      for (const { name } of [...node.attributes]) {
        if (!name.startsWith(MARK)) continue;
        node.removeAttribute(name);
        const slot = Number(name.slice(MARK.length));
        work.push(() => bind(/** @type {Element} */ (node), names[slot], values[slot]));
      }
    } else if (node.textContent?.startsWith(MARK)) {
      const given = values[Number(node.textContent.slice(MARK.length))];
      work.push(() => fill(/** @type {Comment} */ (node), given));
    }
  }
  for (const step of work) step();
  const solid = [...content.childNodes].filter((n) => n.nodeType !== 3 || n.textContent?.trim());
  return solid.length === 1 ? solid[0] : content;
}

/** Whether a value is a function or a signal. @param {any} given */
function isLive(given) {
  return typeof given === "function" || typeof given?.peek === "function";
}

/** @param {any} given */
function now(given) {
  return typeof given === "function" ? given() : given.value;
}

/**
 * @param {Element} element
 * @param {string} name
 * @param {any} given
 */
function bind(element, name, given) {
  if (name.startsWith("@")) {
    element.addEventListener(name.slice(1), given);
  } else if (name === "ref") {
    given(element);
  } else if (isLive(given)) {
    effect(() => setAttribute(element, name, now(given)));
  } else {
    setAttribute(element, name, given);
  }
}

/**
 * @param {any} element
 * @param {string} name
 * @param {any} value
 */
function setAttribute(element, name, value) {
  if (name.startsWith(".")) {
    const property = name.slice(1);
    if (element[property] !== value) element[property] = value;
  } else if (name === "css") {
    element.style.cssText = value ?? "";
  } else if (value === false || value === null || value === undefined) {
    element.removeAttribute(name);
  } else {
    element.setAttribute(name, value === true ? "" : String(value));
  }
}

/**
 * Put a value in the place of a comment.
 * @param {Comment} comment
 * @param {any} given
 */
function fill(comment, given) {
  if (!isLive(given)) {
    comment.replaceWith(...nodes(given));
    return;
  }
  const end = document.createComment("");
  comment.textContent = "";
  comment.after(end);
  effect(() => {
    const fresh = nodes(now(given));
    while (comment.nextSibling && comment.nextSibling !== end) comment.nextSibling.remove();
    comment.after(...fresh);
  });
}

/**
 * @param {any} given
 * @returns {Node[]}
 */
function nodes(given) {
  if (given === null || given === undefined || given === false) return [];
  if (Array.isArray(given)) return given.flatMap(nodes);
  if (given instanceof DocumentFragment) return [...given.childNodes];
  if (given instanceof Node) return [given];
  return [document.createTextNode(String(given))];
}
