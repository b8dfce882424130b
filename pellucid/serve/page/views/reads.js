// What the chosen token reads: arcs from it to the tokens before, with the weights as numbers.

import { effect, signal } from "../signals.js";
import { html, svg } from "../html.js";
import { cell, headOf, run, token } from "../state.js";
import { format } from "../address.js";
import { tensor } from "../data/tensors.js";
import { percent, visible } from "../data/numbers.js";

const LINE = 19; // pixels of a row
const MOST = 40; // tokens shown: all, or those that weigh most

/** @param {import("../state.js").Step} one */
export function reads(one) {
  const weights = signal(/** @type {Float32Array | Float64Array | null} */ (null));
  effect(() => {
    const at = format(one.name, [headOf(one), token.value]);
    let live = true;
    tensor(/** @type {any} */ (run.peek()).run, at).then(({ data }) => live && (weights.value = data), () => {});
    return () => (live = false);
  });
  return html`<aside class="reads" aria-label="what the chosen token reads">
    ${() => (weights.value ? arcs(weights.value) : "")}</aside>`;
}

/** @param {Float32Array | Float64Array} weights */
function arcs(weights) {
  const query = token.peek();
  const tokens = run.peek()?.tokens ?? [];
  const keys = shownKeys(weights, query);
  const row = new Map(keys.map((key, i) => [key, i]));
  const most = Math.max(...keys.map((key) => weights[key]), 1e-9);
  const y = (/** @type {number} */ key) => (row.get(key) ?? 0) * LINE + LINE / 2;
  const lines = keys.filter((key) => weights[key] > 0.002).map((key) => svg`<path class="arc"
    d=${arc(y(query), y(key))} stroke-width=${0.6 + 5 * weights[key]} opacity=${0.25 + 0.75 * (weights[key] / most)}></path>`);
  const left = keys.length < query + 1 ? `the ${keys.length} that weigh most of ${query + 1}` : "";
  return html`<h2>${visible(tokens[query] ?? "")} reads</h2>
    <div class="arcs"><svg width="52" height=${keys.length * LINE} aria-hidden="true">${lines}</svg>
    <ol>${keys.map((key) => html`<li data-self=${key === query} aria-current=${() => String(cell.value?.col === key)}
      @click=${() => (cell.value = { row: query, col: key })}>
      <bdi>${visible(tokens[key] ?? "")}</bdi><i css=${`width:${(weights[key] / most) * 100}%`}></i>
      <span>${percent(weights[key])}</span></li>`)}</ol></div><p class="note">${left}</p>`;
}

/** @param {Float32Array | Float64Array} weights @param {number} query */
function shownKeys(weights, query) {
  const all = Array.from({ length: Math.min(query + 1, weights.length) }, (_, i) => i);
  if (all.length <= MOST) return all;
  const heavy = [...all].sort((a, b) => weights[b] - weights[a]).slice(0, MOST - 1);
  return [...new Set([...heavy, query])].sort((a, b) => a - b);
}

/** A curve on the left from one height to another. @param {number} from @param {number} to */
function arc(from, to) {
  if (from === to) return `M50 ${from - 4} a5 5 0 1 0 0 8`;
  const reach = 50 - Math.min(46, 8 + Math.abs(from - to) * 0.28);
  return `M50 ${from} C${reach} ${from} ${reach} ${to} 50 ${to}`;
}
