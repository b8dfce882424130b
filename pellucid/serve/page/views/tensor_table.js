// The numbers around the chosen cell as a table, for reading and for screen readers.

import { effect, signal } from "../signals.js";
import { html } from "../html.js";
import { cell, run, token } from "../state.js";
import { exact, visible } from "../data/numbers.js";
import { maskedBelow } from "../data/scale.js";
import { titleOf } from "./role.js";
import { planeOf } from "./tensor_map.js";

const ROWS = 64;
const COLS = 24;

/** @param {import("../state.js").Step} one */
export function tensorTable(one) {
  const plane = planeOf(one);
  const box = signal({ row: 0, col: 0 });
  effect(() => {
    const at = cell.value ?? { row: token.value, col: 0 };
    const near = (/** @type {number} */ i, /** @type {number} */ size, /** @type {number} */ all) =>
      Math.max(0, Math.min(i - Math.floor(size / 2), all - size));
    const next = { row: near(at.row, ROWS, plane.rows), col: near(at.col, COLS, plane.cols) };
    if (next.row !== box.peek().row || next.col !== box.peek().col) box.value = next;
  });
  return html`<div class="tablebox">${() => (plane.version.value, table(one, plane, box.value))}</div>`;
}

/**
 * @param {import("../state.js").Step} one
 * @param {import("../data/plane.js").Plane} plane
 * @param {import("../state.js").Cell} from
 */
function table(one, plane, from) {
  const tokens = run.peek()?.tokens ?? [];
  const [rowAxis, colAxis] = one.shape.length === 1 ? ["", one.dims[0]] : one.dims.slice(-2);
  const label = (/** @type {string} */ axis, /** @type {number} */ i) =>
    axis === "T" || axis === "S" ? visible(tokens[i] ?? "") : String(i);
  const rows = range(from.row, Math.min(ROWS, plane.rows));
  const cols = range(from.col, Math.min(COLS, plane.cols));
  return html`<table class="numbers"><caption class="spoken">${titleOf(one)}</caption><thead><tr><th></th>
    ${cols.map((col) => html`<th scope="col">${label(colAxis, col)}</th>`)}</tr></thead><tbody>
    ${rows.map((row) => html`<tr><th scope="row">${label(rowAxis, row)}</th>
      ${cols.map((col) => html`<td aria-selected=${() => String(cell.value?.row === row && cell.value?.col === col)}
        @click=${() => (cell.value = { row, col })}>${text(plane.value(row, col), plane.dtype)}</td>`)}</tr>`)}
    </tbody></table>`;
}

/** @param {number} start @param {number} length */
function range(start, length) {
  return Array.from({ length }, (_, i) => start + i);
}

/** @param {number | undefined} value @param {string} dtype */
function text(value, dtype) {
  if (value === undefined) return "…";
  return value <= maskedBelow(dtype) ? "masked" : exact(value, dtype).replace("-", "−");
}
