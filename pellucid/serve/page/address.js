// Addresses: `layers.3.attn.scores[5,7,3]` names a tensor and an index into it. The same text is
// the page's URL, the breadcrumb, an argument of the command line and an index in Python.

/** @typedef {{name: string, index: (number | [number, number])[]}} Address */
/**
 * @typedef {{model: string, run: string, address: string, options: Record<string, string>}} Place
 */

/**
 * Name and index of an address; throws an Error that says what is wrong with it.
 * @param {string} text
 * @returns {Address}
 */
export function parse(text) {
  const found = /^([A-Za-z_][\w.]*)(?:\[([^\]]*)\])?$/.exec(text.trim());
  if (!found) throw new Error(`${text} is no address: expected one like layers.0.attn.scores[0,3,1]`);
  const [, name, inside] = found;
  if (inside === undefined || inside.trim() === "") return { name, index: [] };
  return { name, index: inside.split(",").map((part) => parsePart(part.trim(), text)) };
}

/**
 * @param {string} part
 * @param {string} text
 * @returns {number | [number, number]}
 */
function parsePart(part, text) {
  if (/^\d+$/.test(part)) return Number(part);
  const range = /^(\d*):(\d*)$/.exec(part);
  if (!range) throw new Error(`${text}: ${part || "nothing"} is no index: expected 3 or 2:5`);
  return [Number(range[1] || 0), range[2] ? Number(range[2]) : Infinity];
}

/**
 * @param {string} name
 * @param {(number | [number, number])[]} index
 */
export function format(name, index) {
  if (!index.length) return name;
  const parts = index.map((i) =>
    typeof i === "number" ? `${i}` : `${i[0] || ""}:${i[1] === Infinity ? "" : i[1]}`);
  return `${name}[${parts.join(",")}]`;
}

/** The layer in a name, or null. @param {string} name */
export function layerOf(name) {
  const found = /^layers\.(\d+)\./.exec(name);
  return found ? Number(found[1]) : null;
}

/** A name without its layer. @param {string} name */
export function leafOf(name) {
  return name.replace(/^layers\.\d+\./, "");
}

/**
 * @param {string} leaf
 * @param {number | null} layer
 */
export function nameOf(leaf, layer) {
  return layer === null ? leaf : `layers.${layer}.${leaf}`;
}

/**
 * The hash of a URL. @param {Place} place
 */
export function toHash({ model, run, address, options }) {
  const path = [model, run, address].map(encodeURIComponent).join("/");
  const query = new URLSearchParams(
    Object.entries(options).filter(([, value]) => value !== "" && value !== undefined)).toString();
  return `#/${path.replaceAll("%5B", "[").replaceAll("%5D", "]").replaceAll("%2C", ",")}`
    + (query ? `?${query}` : "");
}

/**
 * @param {string} hash
 * @returns {Place}
 */
export function fromHash(hash) {
  const [path, query = ""] = hash.replace(/^#\/?/, "").split("?");
  const [model = "", run = "", address = ""] = path.split("/").map(decode);
  return { model, run, address, options: Object.fromEntries(new URLSearchParams(query)) };
}

/** @param {string} text */
function decode(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}
