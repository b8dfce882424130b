// Contributions: the chosen logit as a sum over the embedding, every head and every MLP.

import { batch, computed, effect, scope, signal } from "../signals.js";
import { html } from "../html.js";
import { get } from "../data/api.js";
import { chosenToken, goTo, head, live, model, report, run, token } from "../state.js";
import { ArrayPlane } from "../data/plane.js";
import { exact, short, visible } from "../data/numbers.js";
import { Heatmap } from "./heatmap.js";
import { legendBar } from "./legend.js";
import { candidate, candidates } from "./bars.js";

/** @typedef {{name: string, value: number}} Part */
/** @typedef {{logit: number, parts: Part[], sum: number, difference: number}} Parts */

export function partsRoom() {
  const next = candidates(8);
  const found = signal(/** @type {Parts | null} */ (null));
  const id = computed(() => chosenToken.value ?? next.value?.top[0]?.id ?? null);
  effect(() => {
    const [of, row, tokenId] = [run.value?.run, token.value, id.value];
    if (!of || tokenId === null) return;
    const control = new AbortController();
    get(`/api/runs/${encodeURIComponent(of)}/contributions?row=${row}&id=${tokenId}`, control.signal)
      .then((answer) => (found.value = answer), report);
    return () => control.abort();
  });
  const grid = html`<div class="fill"></div>`;
  effect(() => {
    grid.replaceChildren();
    if (found.value) return scope(() => grid.replaceChildren(partsMap(/** @type {Parts} */ (found.peek()))));
  });
  return html`<section class="room parts" aria-label="contributions"><div class="panel side">
    <h2>Which token?</h2><p class="note">After token ${() => token.value} ${() => visible(run.value?.tokens[token.value] ?? "")}</p>
    <ol class="barlist">${() => next.value?.top.map((one) => candidate(one, next.value?.top[0].probability ?? 1)) ?? ""}</ol></div>
    <div class="panel"><h2>Its logit by layer, head and MLP</h2>
    <p class="note">${() => (found.value ? sumLine(found.value) : "")}</p>${grid}</div>
    <div class="panel side"><h2>Largest parts</h2>${() => (found.value ? largest(found.value) : "")}</div></section>`;
}

/** @param {Parts} found */
function sumLine(found) {
  return html`Sum of ${found.parts.length} parts ${short(found.sum)}, logit ${short(found.logit)},
    difference ${found.difference.toExponential(1)}.`;
}

/** Rows: layers; columns: heads, then the MLP. @param {Parts} found */
function partsMap(found) {
  const heads = model.peek()?.heads ?? 1;
  const layers = model.peek()?.layers ?? 1;
  const values = Array.from({ length: layers }, () => new Array(heads + 1).fill(0));
  for (const { name, value } of found.parts) {
    const place = /^layers\.(\d+)\.(?:attn\.head\.(\d+)|mlp)$/.exec(name);
    if (place) values[Number(place[1])][place[2] === undefined ? heads : Number(place[2])] = value;
  }
  const legend = signal(/** @type {any} */ (null));
  const at = signal(/** @type {import("../state.js").Cell | null} */ (null));
  const named = (/** @type {number} */ row, /** @type {number} */ col) => `layer ${row} ${col === heads ? "MLP" : `head ${col}`}`;
  const map = new Heatmap({
    plane: new ArrayPlane(values), palette: "signed", upward: true, label: "contribution by layer and head", most: 46, widest: 60,
    rowLabel: (row) => `layer ${row}`, colLabel: (col) => (col === heads ? "MLP" : String(col)),
    say: (row, col, value) => `${named(row, col)}, ${short(value ?? NaN)}`,
    cursor: () => at.value, bend: () => "sym",
    onLegend: (next) => legend.peek()?.scale.key !== next.scale.key && (legend.value = next),
    pick: (row, col) => {
      at.value = { row, col };
      live.value = `${named(row, col)}, ${exact(values[row][col], "float64")}`;
    },
  });
  const open = () => at.peek() && openPart(/** @type {any} */ (at.peek()).row, /** @type {any} */ (at.peek()).col, heads);
  map.canvas.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => event.key === "Enter" && open());
  return html`<div class="mapbox">${map.element}<p class="open">${() => (at.value
    ? html`<button @click=${open}>open ${named(at.value.row, at.value.col)}</button>` : "")}</p>
    ${legendBar(legend, { choice: false })}</div>`;
}

/** @param {number} row @param {number} col @param {number} heads */
function openPart(row, col, heads) {
  batch(() => {
    if (col < heads) head.value = col;
    goTo(`layers.${row}.${col < heads ? "attn.pattern" : "mlp_out"}`);
  });
}

/** @param {Parts} found */
function largest(found) {
  const sorted = [...found.parts].sort((a, b) => Math.abs(b.value) - Math.abs(a.value)).slice(0, 24);
  const most = Math.max(...sorted.map((one) => Math.abs(one.value)), 1e-9);
  return html`<ol class="signed">${sorted.map(({ name, value }) => {
    const width = (Math.abs(value) / most) * 50;
    return html`<li><span>${name.replace(/^layers\.(\d+)\.(attn\.)?/, "$1 ").replace(".", " ")}</span><span class="track"><i
      class=${value < 0 ? "minus" : "plus"} css=${`width:${width}%;left:${value < 0 ? 50 - width : 50}%`}></i></span>
      <span class="number">${short(value)}</span></li>`;
  })}</ol>`;
}
