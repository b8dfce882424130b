// Answers that a single-file page carries in place of a server. Whole tensors are recorded; what
// the page asks for is a part of them, which is cut out here.

import { parse } from "../address.js";

/** @typedef {{headers: Record<string, string>, body: string}} Recorded */
/** @type {Record<string, Recorded> | null} */
let answers = null;

/** Whether this page is a recording. */
export function isRecording() {
  const element = document.getElementById("recording");
  if (!answers && element) answers = JSON.parse(element.textContent || "{}");
  return answers !== null;
}

/**
 * The answer to a path, or null where it was not recorded.
 * @param {string} path
 * @returns {Response | null}
 */
export function recordedAnswer(path) {
  const whole = answers?.[path];
  if (whole) return new Response(bytesOf(whole), { headers: whole.headers });
  const [route, query = ""] = path.split("?");
  const asked = new URLSearchParams(query);
  if (route.endsWith("/tensor")) return slice(route, asked);
  if (route.endsWith("/card")) return known(`${route}?step=${encodeURIComponent(asked.get("step") ?? "")}`);
  if (route.endsWith("/logits")) return fewer(`${route}?row=${asked.get("row")}&top=20`, Number(asked.get("top")));
  return null;
}

/** @param {string} path */
function known(path) {
  return answers?.[path] ? recordedAnswer(path) : null;
}

/** @param {Recorded} one */
function bytesOf(one) {
  return Uint8Array.from(atob(one.body), (letter) => letter.charCodeAt(0));
}

/** The first of the recorded candidates. @param {string} path @param {number} top */
function fewer(path, top) {
  const whole = answers?.[path];
  if (!whole) return null;
  const said = JSON.parse(new TextDecoder().decode(bytesOf(whole)));
  return new Response(JSON.stringify({ ...said, top: said.top.slice(0, top) }));
}

/** @type {Record<string, number>} */
const SIZES = { bool: 1, uint8: 1, float16: 2, bfloat16: 2, float32: 4, int32: 4, float64: 8, int64: 8 };

/**
 * A slice of a recorded tensor. Thumbnails and overviews ask for a reduced one: they get every cell,
 * which the page draws just as well.
 * @param {string} route
 * @param {URLSearchParams} asked
 */
function slice(route, asked) {
  const { name, index } = parse(asked.get("at") ?? "");
  const whole = answers?.[`${route}?at=${encodeURIComponent(name)}`];
  if (!whole) return null;
  const headers = Object.fromEntries(Object.entries(whole.headers).map(([key, value]) => [key.toLowerCase(), value]));
  const shape = headers["x-shape"].split(",").filter(Boolean).map(Number);
  const size = SIZES[headers["x-dtype"]];
  const ranges = shape.map((length, axis) => {
    const at = index[axis] ?? [0, Infinity];
    return typeof at === "number" ? [at, at + 1] : [at[0], Math.min(at[1], length)];
  });
  const kept = shape.map((_, axis) => ranges[axis][1] - ranges[axis][0]).filter((_, axis) => typeof index[axis] !== "number");
  return new Response(cut(bytesOf(whole), shape, ranges, size), {
    headers: { "X-Shape": kept.join(","), "X-Dtype": headers["x-dtype"] },
  });
}

/**
 * @param {Uint8Array<ArrayBuffer>} data
 * @param {number[]} shape
 * @param {number[][]} ranges first and last of each axis
 * @param {number} size bytes of an element
 */
function cut(data, shape, ranges, size) {
  const strides = shape.map((_, axis) => shape.slice(axis + 1).reduce((a, b) => a * b, 1) * size);
  /** @type {Uint8Array[]} */
  const pieces = [];
  const walk = (/** @type {number} */ axis, /** @type {number} */ start) => {
    if (axis === shape.length - 1) {
      pieces.push(data.subarray(start + ranges[axis][0] * size, start + ranges[axis][1] * size));
      return;
    }
    for (let i = ranges[axis][0]; i < ranges[axis][1]; i++) walk(axis + 1, start + i * strides[axis]);
  };
  walk(0, 0);
  const made = new Uint8Array(pieces.reduce((sum, piece) => sum + piece.length, 0));
  pieces.reduce((at, piece) => (made.set(piece, at), at + piece.length), 0);
  return made;
}
