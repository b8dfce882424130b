// The heat map of a step: tokens by channels, queries by keys, or one row of numbers.

import { effect, signal } from "../signals.js";
import { html } from "../html.js";
import { bend, cell, hasHeads, headOf, live, run, token } from "../state.js";
import { TensorPlane } from "../data/plane.js";
import { exact, visible } from "../data/numbers.js";
import { paletteOf, titleOf } from "./role.js";
import { Heatmap } from "./heatmap.js";
import { legendBar } from "./legend.js";
import { profile } from "./profile.js";

/** @typedef {import("../state.js").Step} Step */

/** The two axes of a step that a picture shows. @param {Step} one */
export function planeOf(one) {
  const lead = hasHeads(one) ? [headOf(one)] : [];
  const [rows, cols] = one.shape.length === 1 ? [1, one.shape[0]] : one.shape.slice(-2);
  const id = /** @type {any} */ (run.peek()).run;
  return new TensorPlane(id, one.name, lead, rows, cols, one.dtype, one.shape.length === 1);
}

/** Words for a cell: query 7 'mat', key 3 'on', 1.914. @param {Step} one */
export function sayCell(one) {
  const tokens = run.peek()?.tokens ?? [];
  const [rowAxis, colAxis] = one.shape.length === 1 ? ["", one.dims[0]] : one.dims.slice(-2);
  const named = (/** @type {string} */ axis, /** @type {number} */ i, /** @type {string} */ word) =>
    axis === "T" || axis === "S" ? `${word} ${i} '${tokens[i]?.trim() ?? ""}'` : axis ? `${AXES[axis] ?? axis} ${i}` : "";
  const attention = colAxis === "S";
  return (/** @type {number} */ row, /** @type {number} */ col, /** @type {number | undefined} */ value) => {
    const words = [named(rowAxis, row, attention ? "query" : "token"), named(colAxis, col, attention ? "key" : "token")];
    const said = value === undefined ? "…" : one.dtype === "bool" ? (value ? "may look" : "masked") : exact(value, one.dtype);
    return [...words.filter(Boolean), said].join(", ");
  };
}

/** @type {Record<string, string>} */
const AXES = { C: "channel", D: "component", F: "hidden unit", V: "token id", "D/2": "pair", H: "head" };

/** The bend that a step begins with. @param {Step} one */
function naturalBend(one) {
  return one.dtype === "bool" || /rope\./.test(one.id) ? "lin" : "sym";
}

/** @param {Step} one */
export function tensorMap(one) {
  const plane = planeOf(one);
  const tokens = run.peek()?.tokens ?? [];
  const [rowAxis, colAxis] = one.shape.length === 1 ? ["", one.dims[0]] : one.dims.slice(-2);
  const isToken = (/** @type {string} */ axis) => axis === "T" || axis === "S";
  const legend = signal(/** @type {any} */ (null));
  const square = isToken(rowAxis) && isToken(colAxis);
  const map = new Heatmap({
    plane, palette: paletteOf(one), square, label: `${titleOf(one)}, ${plane.rows} rows, ${plane.cols} columns`,
    rowLabel: isToken(rowAxis) ? (row) => visible(tokens[row] ?? String(row)) : undefined,
    colLabel: isToken(colAxis) ? (col) => visible(tokens[col] ?? String(col)) : undefined,
    say: sayCell(one), cursor: () => cell.value,
    markedRow: rowAxis === "T" ? () => token.value : undefined,
    bend: () => bend.value || naturalBend(one),
    clearZero: /pattern$/.test(one.id),
    limit: one.dtype === "bool" ? 1 : undefined,
    onLegend: (next) => {
      if (legend.peek()?.scale.key !== next.scale.key || legend.peek()?.note !== next.note) legend.value = next;
    },
    pick: (row, col) => {
      cell.value = { row, col };
      if (rowAxis === "T") token.value = row;
      else if (isToken(colAxis)) token.value = col;
    },
  });
  effect(() => {
    const at = cell.value;
    plane.version.value;
    if (at) live.value = sayCell(one)(at.row, at.col, plane.value(at.row, at.col));
  });
  return html`<div class="mapbox" data-square=${square}>${map.element}
    ${square || plane.flat || plane.cols < 8 ? "" : profile(plane)}
    ${legendBar(legend, { masked: /masked_scores$|mask$|pattern$/.test(one.id) })}</div>`;
}
