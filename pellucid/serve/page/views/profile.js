// The chosen token's vector as a row of bars below its heat map.

import { effect, onEnd } from "../signals.js";
import { html } from "../html.js";
import { cell, run, token } from "../state.js";
import { short, visible } from "../data/numbers.js";
import { ink, theme } from "../theme.js";

/** @param {import("../data/plane.js").Plane} plane */
export function profile(plane) {
  const canvas = html`<canvas class="bars" aria-hidden="true"></canvas>`;
  const caption = html`<figcaption></figcaption>`;
  const box = html`<figure class="profile">${caption}${canvas}</figure>`;
  const draw = () => paint(canvas, plane, token.peek(), cell.peek()?.col ?? -1);
  const observer = new ResizeObserver(draw);
  observer.observe(canvas);
  onEnd(() => observer.disconnect());
  canvas.addEventListener("click", (/** @type {MouseEvent} */ event) => {
    const col = Math.floor((event.offsetX / canvas.clientWidth) * plane.cols);
    cell.value = { row: token.peek(), col: Math.min(Math.max(col, 0), plane.cols - 1) };
  });
  effect(() => {
    plane.version.value;
    theme.value;
    cell.value;
    const row = token.value;
    const values = rowOf(plane, row);
    caption.textContent = values ? `${visible(run.peek()?.tokens[row] ?? "")} · rms ${short(rms(values))} · `
      + `largest ${short(largest(values).value)} at ${largest(values).at}` : "";
    draw();
  });
  return box;
}

/** @param {import("../data/plane.js").Plane} plane @param {number} row */
function rowOf(plane, row) {
  const values = new Float64Array(plane.cols);
  for (let col = 0; col < plane.cols; col++) {
    const value = plane.value(row, col);
    if (value === undefined) return null;
    values[col] = value;
  }
  return values;
}

/** @param {Float64Array} values */
function rms(values) {
  return Math.sqrt(values.reduce((sum, value) => sum + value * value, 0) / values.length);
}

/** @param {Float64Array} values */
function largest(values) {
  let at = 0;
  values.forEach((value, i) => Math.abs(value) > Math.abs(values[at]) && (at = i));
  return { at, value: values[at] };
}

/**
 * @param {HTMLCanvasElement} canvas
 * @param {import("../data/plane.js").Plane} plane
 * @param {number} row
 * @param {number} chosen
 */
function paint(canvas, plane, row, chosen) {
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  if (!width) return;
  canvas.width = width * devicePixelRatio;
  canvas.height = height * devicePixelRatio;
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  context.scale(devicePixelRatio, devicePixelRatio);
  const values = row < plane.rows ? rowOf(plane, row) : null;
  context.fillStyle = ink("--line");
  context.fillRect(0, height / 2, width, 1);
  if (!values) return;
  const most = Math.max(Math.abs(largest(values).value), 1e-300);
  const step = width / plane.cols;
  for (let col = 0; col < plane.cols; col++) {
    const tall = (values[col] / most) * (height / 2 - 2);
    context.fillStyle = col === chosen ? ink("--accent") : ink(values[col] < 0 ? "--minus" : "--plus");
    const y = tall < 0 ? height / 2 : height / 2 - tall;
    context.fillRect(col * step, y, Math.max(step - (step > 3 ? 1 : 0), col === chosen ? 2 : 0.6), Math.max(Math.abs(tall), 0.5));
  }
}
