// The heat map of a step: tokens by channels, queries by keys, or one row of numbers.

import { effect, signal } from "../signals.js";
import { html } from "../html.js";
import { bend, cell, hasHeads, headOf, live, modelOf, run, token } from "../state.js";
import { TensorPlane } from "../data/plane.js";
import { exact, visible } from "../data/numbers.js";
import { paletteOf, titleOf } from "./role.js";
import { Heatmap } from "./heatmap.js";
import { legendBar } from "./legend.js";
import { profile } from "./profile.js";

/** @typedef {import("../state.js").Step} Step */

/** @typedef {import("../state.js").Run} Run */

/**
 * The two axes of a step that a picture shows.
 * @param {Step} one
 * @param {Run} of
 * @param {string} [minus] a run that is subtracted
 */
export function planeOf(one, of = shownRun(), minus = "") {
  const lead = hasHeads(one) ? [headOf(one, modelOf(of))] : [];
  const [rows, cols] = one.shape.length === 1 ? [1, one.shape[0]] : one.shape.slice(-2);
  const dtype = minus ? "float64" : one.dtype;
  return new TensorPlane(of.run, one.name, lead, rows, cols, dtype, one.shape.length === 1, minus);
}

function shownRun() {
  return /** @type {Run} */ (run.peek());
}

/** Words for a cell: query 7 'mat', key 3 'on', 1.914. @param {Step} one @param {Run} of @param {string} dtype */
export function sayCell(one, of = shownRun(), dtype = one.dtype) {
  const { tokens } = of;
  const [rowAxis, colAxis] = one.shape.length === 1 ? ["", one.dims[0]] : one.dims.slice(-2);
  const named = (/** @type {string} */ axis, /** @type {number} */ i, /** @type {string} */ word) =>
    axis === "T" || axis === "S" ? `${word} ${i} '${tokens[i]?.trim() ?? ""}'` : axis ? `${AXES[axis] ?? axis} ${i}` : "";
  const attention = colAxis === "S";
  return (/** @type {number} */ row, /** @type {number} */ col, /** @type {number | undefined} */ value) => {
    const words = [named(rowAxis, row, attention ? "query" : "token"), named(colAxis, col, attention ? "key" : "token")];
    const said = value === undefined ? "…" : dtype === "bool" ? (value ? "may look" : "masked") : exact(value, dtype);
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
  const { legend, box } = picture(one, plane, shownRun());
  effect(() => {
    const at = cell.value;
    plane.version.value;
    if (at) live.value = sayCell(one)(at.row, at.col, plane.value(at.row, at.col));
  });
  const small = box.dataset.square === "true" || plane.flat || plane.cols < 8;
  if (!small) box.append(profile(plane));
  box.append(legendBar(legend, { masked: canBeMasked(one) }));
  return box;
}

/** @param {Step} one */
export function canBeMasked(one) {
  return /masked_scores$|mask$|pattern$/.test(one.id);
}

/**
 * A heat map of a step's plane, what its scale is, and the box around it.
 * @param {Step} one
 * @param {TensorPlane} plane
 * @param {Run} of
 * @param {{palette?: import("../data/scale.js").Palette, alike?: TensorPlane, name?: string}} [how]
 */
export function picture(one, plane, of, how = {}) {
  const { tokens } = of;
  const [rowAxis, colAxis] = one.shape.length === 1 ? ["", one.dims[0]] : one.dims.slice(-2);
  const isToken = (/** @type {string} */ axis) => axis === "T" || axis === "S";
  const legend = signal(/** @type {any} */ (null));
  const square = isToken(rowAxis) && isToken(colAxis);
  const dtype = plane.minus ? plane.dtype : one.dtype;
  const inside = (/** @type {import("../state.js").Cell | null} */ at) => (at && at.row < plane.rows && at.col < plane.cols ? at : null);
  const said = sayCell(one, of, dtype);
  const map = new Heatmap({
    plane, palette: how.palette ?? paletteOf(one), square, alike: how.alike,
    label: `${how.name ? `${how.name}: ` : ""}${titleOf(one)}, ${plane.rows} rows, ${plane.cols} columns`,
    rowLabel: isToken(rowAxis) ? (row) => visible(tokens[row] ?? String(row)) : undefined,
    colLabel: isToken(colAxis) ? (col) => visible(tokens[col] ?? String(col)) : undefined,
    say: (row, col, value) => (how.name ? `${how.name}: ` : "") + said(row, col, value),
    cursor: () => inside(cell.value),
    markedRow: rowAxis === "T" ? () => token.value : undefined,
    bend: () => bend.value || naturalBend(one),
    clearZero: !plane.minus && /pattern$/.test(one.id),
    limit: dtype === "bool" ? 1 : undefined,
    onLegend: (next) => {
      if (legend.peek()?.scale.key !== next.scale.key || legend.peek()?.note !== next.note) legend.value = next;
    },
    pick: (row, col) => {
      cell.value = { row, col };
      if (rowAxis === "T") token.value = row;
      else if (isToken(colAxis)) token.value = col;
    },
  });
  return { map, legend, box: /** @type {HTMLElement} */ (html`<div class="mapbox" data-square=${String(square)}>${map.element}</div>`) };
}
