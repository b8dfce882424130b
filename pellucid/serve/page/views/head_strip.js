// A thumbnail of every head of a tensor: the whole layer at a glance, and the way to a head.

import { effect, onEnd } from "../signals.js";
import { html } from "../html.js";
import { head, headOf, model, run } from "../state.js";
import { format } from "../address.js";
import { tensor } from "../data/tensors.js";
import { Scale, rangeOf } from "../data/scale.js";
import { theme } from "../theme.js";
import { paletteOf } from "./role.js";

const SIDE = 40; // cells of a thumbnail at most

/** @param {import("../state.js").Step} one */
export function headStrip(one) {
  const heads = one.shape[0];
  const group = Math.max(1, (model.peek()?.heads ?? heads) / heads);
  const list = html`<div class="thumbs" role="listbox" aria-label="heads"></div>`;
  const canvases = Array.from({ length: heads }, (_, i) => {
    const canvas = html`<canvas width="1" height="1" aria-hidden="true"></canvas>`;
    list.append(html`<button role="option" aria-selected=${() => String(headOf(one) === i)}
      title=${group > 1 ? `key/value head ${i}: query heads ${i * group} to ${(i + 1) * group - 1}` : `head ${i}`}
      aria-label=${`head ${i}`} @click=${() => (head.value = i * group)}>${canvas}<small>${i}</small></button>`);
    return canvas;
  });
  let live = true;
  onEnd(() => (live = false));
  const [rows, cols] = one.shape.slice(-2).map((size) => Math.min(size, SIDE));
  const small = one.shape[1] <= SIDE && one.shape[2] <= SIDE;
  const id = /** @type {any} */ (run.peek()).run;
  const pieces = small
    ? tensor(id, one.name).then(({ data }) => cut(data, heads))
    : tensor(id, format(one.name, []), { reduce: "absmax", to: [rows, cols] }).then(({ data }) => cut(data, heads));
  pieces.then((values) => {
    if (!live) return;
    effect(() => paint(canvases, values, { width: values[0].length / rows, palette: paletteOf(one), dark: theme.value === "dark", dtype: one.dtype }));
  }, () => {});
  return list;
}

/** @param {Float32Array | Float64Array} data @param {number} heads */
function cut(data, heads) {
  const size = data.length / heads;
  return Array.from({ length: heads }, (_, i) => data.subarray(i * size, (i + 1) * size));
}

/**
 * @param {HTMLCanvasElement[]} canvases
 * @param {(Float32Array | Float64Array)[]} values
 * @param {{width: number, palette: import("../data/scale.js").Palette, dark: boolean, dtype: string}} how
 */
function paint(canvases, values, { width, palette, dark, dtype }) {
  canvases.forEach((canvas, i) => {
    const { limit, knee } = rangeOf(values[i], dtype);
    const scale = new Scale({ palette, dark, bend: "sym", limit, knee, dtype, clearZero: palette === "share" });
    canvas.width = width;
    canvas.height = values[i].length / width;
    const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
    const image = context.createImageData(canvas.width, canvas.height);
    scale.paint(values[i], new Uint32Array(image.data.buffer), width);
    context.putImageData(image, 0, 0);
  });
}
