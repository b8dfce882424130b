// Logit lens: what the stream would predict if it went to the head now, layer by token.

import { effect, scope, signal } from "../signals.js";
import { html } from "../html.js";
import { get } from "../data/api.js";
import { live, report, run, token } from "../state.js";
import { Plane } from "../data/plane.js";
import { percent, visible } from "../data/numbers.js";
import { Heatmap } from "./heatmap.js";
import { legendBar } from "./legend.js";
import { pointName } from "./role.js";

/** @typedef {{id: number, text: string, probability: number}} Guess */
/** @typedef {{top: Guess[]}} Cell */
/**
 * Rows come from the top, the model's own output first; those that are yet to come are null.
 * @typedef {{layers: string[], first: number, tokens: string[], cells: (Cell[] | null)[]}} Lens
 */
const TOP = 8;

export function lensRoom() {
  const lens = signal(/** @type {Lens | null} */ (null));
  const at = signal(/** @type {import("../state.js").Cell | null} */ (null));
  const plane = signal(/** @type {Plane | null} */ (null));
  const grid = html`<div class="fill"></div>`;
  effect(() => {
    const now = run.value;
    lens.value = plane.value = at.value = null;
    if (!now) return;
    const control = new AbortController();
    fetchRows(now, control.signal, (grown) => {
      const { cells, tokens } = grown;
      const map = plane.peek() ?? new Plane(cells.length, tokens.length, "float64");
      const shade = (/** @type {Cell[] | null} */ row) => tokens.map((_, col) => (row ? row[col].top[0].probability : -Infinity));
      map.take(Float64Array.from(cells.flatMap(shade)));
      lens.value = grown;
      plane.value = map;
    }).catch(report);
    return () => control.abort();
  });
  effect(() => {
    grid.replaceChildren();
    const shown = plane.value;
    if (shown) return scope(() => grid.replaceChildren(lensMap(shown, () => /** @type {Lens} */ (lens.peek()), at)));
  });
  return html`<section class="room lens" aria-label="logit lens"><div class="panel">
    <h2>Logit lens</h2><p class="note">What each token's stream would predict at each layer; the top row is the model's own output.
    Shade: probability of that guess.</p>${grid}</div>
    <div class="panel side">${() => (lens.value ? guesses(lens.value, at.value) : "")}</div></section>`;
}

/**
 * Ask for the rows from the top downward.
 * @param {import("../state.js").Run} of
 * @param {AbortSignal} stop
 * @param {(grown: Lens) => void} show called with all that is there, after each answer
 */
async function fetchRows(of, stop, show) {
  const names = of.steps.filter((s) => /resid_pre$/.test(s.id)).map((s) => s.id);
  const last = of.steps.filter((s) => /resid_post$/.test(s.id)).at(-1);
  const layers = [...names, last?.id ?? "output"];
  const cells = /** @type {(Cell[] | null)[]} */ (layers.map(() => null));
  for (let below = layers.length; below > 0;) {
    const found = await get(`/api/runs/${encodeURIComponent(of.run)}/lens?top=${TOP}&below=${below}`, stop);
    found.cells.forEach((/** @type {Cell[]} */ row, /** @type {number} */ i) => (cells[found.from + i] = row));
    below = found.from;
    show({ layers, first: found.first, tokens: found.tokens, cells: [...cells] });
  }
}

/**
 * @param {Plane} plane
 * @param {() => Lens} now
 * @param {import("../signals.js").Signal<import("../state.js").Cell | null>} at
 */
function lensMap(plane, now, at) {
  const legend = signal(/** @type {any} */ (null));
  const { tokens, first, layers } = now(); // tokens: those of the shown stretch
  const best = (/** @type {number} */ row, /** @type {number} */ col) => now().cells[row]?.[col].top[0];
  const told = (/** @type {number} */ row, /** @type {number} */ col) => {
    const guess = best(row, col);
    return guess ? `'${guess.text}', ${percent(guess.probability)}` : "computing…";
  };
  const map = new Heatmap({
    plane, palette: "share", upward: true, limit: 1, label: "most probable token by layer and token", most: 30, widest: 150, plain: true,
    rowLabel: (row) => pointName(layers[row]), colLabel: (col) => visible(tokens[col] ?? ""),
    say: (row, col) => `${pointName(layers[row])}, token ${first + col} '${tokens[col]?.trim()}': ${told(row, col)}`,
    text: (row, col) => visible(best(row, col)?.text ?? ""),
    cursor: () => at.value, bend: () => "lin", markedRow: () => at.value?.row ?? -1,
    onLegend: (found) => legend.peek()?.scale.key !== found.scale.key && (legend.value = found),
    pick: (row, col) => {
      at.value = { row, col };
      token.value = first + col;
      live.value = `${pointName(layers[row])}: ${told(row, col)}`;
    },
  });
  return html`<div class="mapbox">${map.element}${legendBar(legend, { choice: false })}</div>`;
}

/** The guesses of one cell, and how the model's own choice rose through the layers. @param {Lens} lens @param {import("../state.js").Cell | null} at */
function guesses(lens, at) {
  const col = at?.col ?? Math.min(Math.max(token.value - lens.first, 0), lens.tokens.length - 1);
  const row = at?.row ?? lens.cells.length - 1;
  const top = lens.cells[row]?.[col].top ?? [];
  const final = /** @type {Cell[]} */ (lens.cells[lens.cells.length - 1])[col].top[0];
  return html`<h2>${pointName(lens.layers[row])}</h2><p class="note">token ${lens.first + col} ${visible(lens.tokens[col])}</p>
    <ol class="barlist">${top.map((one) => html`<li><bdi>${visible(one.text)}</bdi><small>${one.id}</small>
      <span class="track"><i css=${`width:${one.probability * 100}%`}></i></span>
      <span class="number">${percent(one.probability)}</span></li>`)}</ol>
    <h3>${visible(final.text)} through the layers</h3>
    <ol class="rise">${lens.layers.map((name, i) => {
      const guessed = lens.cells[i]?.[col].top ?? [];
      const found = guessed.findIndex((one) => one.id === final.id);
      const share = guessed[found]?.probability ?? 0;
      return html`<li><span>${pointName(name)}</span><span class="track"><i css=${`width:${share * 100}%`}></i></span>
        <span class="number">${found < 0 ? "—" : `#${found + 1}`}</span></li>`;
    }).reverse()}</ol>`;
}
