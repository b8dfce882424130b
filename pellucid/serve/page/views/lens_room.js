// Logit lens: what the stream would predict if it went to the head now, layer by token.

import { effect, scope, signal } from "../signals.js";
import { html } from "../html.js";
import { live, token } from "../state.js";
import { ArrayPlane } from "../data/plane.js";
import { percent, visible } from "../data/numbers.js";
import { Heatmap } from "./heatmap.js";
import { legendBar } from "./legend.js";
import { ofRun } from "./map_room.js";
import { pointName } from "./role.js";

/** @typedef {{id: number, text: string, probability: number}} Guess */
/** @typedef {{layers: string[], first: number, tokens: string[], cells: {top: Guess[]}[][]}} Lens */

export function lensRoom() {
  const lens = ofRun((id) => `/api/runs/${id}/lens?top=8`);
  const at = signal(/** @type {import("../state.js").Cell | null} */ (null));
  const grid = html`<div class="fill"></div>`;
  effect(() => {
    grid.replaceChildren();
    at.value = null;
    if (lens.value) return scope(() => grid.replaceChildren(lensMap(lens.peek(), at)));
  });
  return html`<section class="room lens" aria-label="logit lens"><div class="panel">
    <h2>Logit lens</h2><p class="note">What each token's stream would predict at each layer; the top row is the model's own output.
    Shade: probability of that guess.</p>${grid}</div>
    <div class="panel side">${() => (lens.value ? guesses(lens.value, at.value) : "")}</div></section>`;
}

/** @param {Lens} lens @param {import("../signals.js").Signal<import("../state.js").Cell | null>} at */
function lensMap(lens, at) {
  const legend = signal(/** @type {any} */ (null));
  const { tokens, first } = lens; // those of the shown stretch
  const best = (/** @type {number} */ row, /** @type {number} */ col) => lens.cells[row][col].top[0];
  const map = new Heatmap({
    plane: new ArrayPlane(lens.cells.map((row) => row.map((one) => one.top[0].probability))),
    palette: "share", upward: true, limit: 1, label: "most probable token by layer and token", most: 30, widest: 150,
    rowLabel: (row) => pointName(lens.layers[row]), colLabel: (col) => visible(tokens[col] ?? ""),
    say: (row, col) => `${pointName(lens.layers[row])}, token ${first + col} '${tokens[col]?.trim()}': '${best(row, col).text}', ${percent(best(row, col).probability)}`,
    text: (row, col) => visible(best(row, col).text),
    cursor: () => at.value, bend: () => "lin", markedRow: () => at.value?.row ?? -1,
    onLegend: (found) => legend.peek()?.scale.key !== found.scale.key && (legend.value = found),
    pick: (row, col) => {
      at.value = { row, col };
      token.value = first + col;
      live.value = `${pointName(lens.layers[row])}: '${best(row, col).text}'`;
    },
  });
  return html`<div class="mapbox">${map.element}${legendBar(legend, { choice: false })}</div>`;
}

/** The guesses of one cell, and how the model's own choice rose through the layers. @param {Lens} lens @param {import("../state.js").Cell | null} at */
function guesses(lens, at) {
  const col = at?.col ?? Math.min(Math.max(token.value - lens.first, 0), lens.tokens.length - 1);
  const row = at?.row ?? lens.cells.length - 1;
  const { top } = lens.cells[row][col];
  const final = lens.cells[lens.cells.length - 1][col].top[0];
  return html`<h2>${pointName(lens.layers[row])}</h2><p class="note">token ${lens.first + col} ${visible(lens.tokens[col])}</p>
    <ol class="barlist">${top.map((one) => html`<li><bdi>${visible(one.text)}</bdi><small>${one.id}</small>
      <span class="track"><i css=${`width:${one.probability * 100}%`}></i></span>
      <span class="number">${percent(one.probability)}</span></li>`)}</ol>
    <h3>${visible(final.text)} through the layers</h3>
    <ol class="rise">${lens.layers.map((name, i) => {
      const found = lens.cells[i][col].top.findIndex((one) => one.id === final.id);
      const share = found < 0 ? 0 : lens.cells[i][col].top[found].probability;
      return html`<li><span>${pointName(name)}</span><span class="track"><i css=${`width:${share * 100}%`}></i></span>
        <span class="number">${found < 0 ? "—" : `#${found + 1}`}</span></li>`;
    }).reverse()}</ol>`;
}
