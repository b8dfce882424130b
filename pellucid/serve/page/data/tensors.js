// Tensors as the server sends them: the model's own bits, a slice at a time, kept while there is room.

import { bytes } from "./api.js";

/** @typedef {{data: Float32Array | Float64Array, shape: number[], dtype: string, reduced: string}} Tensor */

const ROOM = 192 * 2 ** 20; // bytes of tensors to keep; the oldest go first
/** @type {Map<string, {tensor: Promise<Tensor>, size: number}>} */
const kept = new Map();
let held = 0;

/**
 * Numbers from little-endian bytes. bfloat16 and float16 widen without rounding, so each number is
 * exactly the model's.
 * @param {ArrayBuffer} buffer
 * @param {string} dtype
 * @returns {Float32Array | Float64Array}
 */
export function decode(buffer, dtype) {
  if (dtype === "float32") return new Float32Array(buffer);
  if (dtype === "float64") return new Float64Array(buffer);
  if (dtype === "bfloat16") {
    const halves = new Uint16Array(buffer);
    const wide = new Uint32Array(halves.length);
    for (let i = 0; i < halves.length; i++) wide[i] = halves[i] << 16;
    return new Float32Array(wide.buffer);
  }
  if (dtype === "float16") return Float32Array.from(new Uint16Array(buffer), half);
  if (dtype === "int64") return Float64Array.from(new BigInt64Array(buffer), Number);
  if (dtype === "int32") return Float64Array.from(new Int32Array(buffer));
  if (dtype === "bool" || dtype === "uint8") return Float32Array.from(new Uint8Array(buffer));
  throw new Error(`the server sent ${dtype}, which this page does not read`);
}

/** @param {number} bits of a float16 */
function half(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

/**
 * @param {string} run
 * @param {string} at
 * @param {{reduce?: string, to?: [number, number], minus?: string}} [how] minus: a run that is subtracted
 */
export function tensorPath(run, at, how = {}) {
  const reduce = how.reduce && how.to ? `&reduce=${how.reduce}&to=${how.to.join(",")}` : "";
  const minus = how.minus ? `&minus=${encodeURIComponent(how.minus)}` : "";
  return `/api/runs/${encodeURIComponent(run)}/tensor?at=${encodeURIComponent(at)}${reduce}${minus}`;
}

/**
 * A tensor or a slice of one.
 * @param {string} run
 * @param {string} at
 * @param {{reduce?: string, to?: [number, number], minus?: string}} [how]
 * @returns {Promise<Tensor>}
 */
export function tensor(run, at, how) {
  const path = tensorPath(run, at, how);
  const known = kept.get(path);
  if (known) {
    kept.delete(path); // to the end of the line: the least recently used goes first
    kept.set(path, known);
    return known.tensor;
  }
  const entry = { size: 0, tensor: fetchTensor(path) };
  kept.set(path, entry);
  entry.tensor.then(
    (found) => {
      entry.size = found.data.byteLength;
      held += entry.size;
      makeRoom();
    },
    () => kept.delete(path));
  return entry.tensor;
}

/** @param {string} path @returns {Promise<Tensor>} */
async function fetchTensor(path) {
  const { headers, buffer } = await bytes(path);
  const dtype = headers.get("X-Dtype") ?? "float32";
  const shape = (headers.get("X-Shape") ?? "").split(",").filter(Boolean).map(Number);
  return { data: decode(buffer, dtype), shape, dtype, reduced: headers.get("X-Reduced") ?? "" };
}

function makeRoom() {
  for (const [path, entry] of kept) {
    if (held <= ROOM) return;
    if (!entry.size) continue; // still on its way
    kept.delete(path);
    held -= entry.size;
  }
}

/** Bytes of tensors on the page. */
export function bytesHeld() {
  return held;
}
