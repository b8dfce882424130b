// How the values of a whole tensor are spread, and what is not a number among them.

import { signal } from "../signals.js";
import { html, svg } from "../html.js";
import { get } from "../data/api.js";
import { report, run } from "../state.js";
import { count, short } from "../data/numbers.js";

/**
 * @typedef {{min: number, max: number, mean: number, rms: number, nan: number, inf: number,
 *   histogram: {edges: number[], counts: number[]}}} Statistics
 */

/** @param {import("../state.js").Step} one */
export function histogram(one) {
  const found = signal(/** @type {Statistics | null} */ (null));
  get(`/api/runs/${encodeURIComponent(/** @type {any} */ (run.peek()).run)}/statistics?name=${encodeURIComponent(one.name)}`)
    .then((answer) => (found.value = answer), report);
  return html`<div class="spread">${() => (found.value ? spread(found.value, one) : "")}</div>`;
}

/** @param {Statistics} found @param {import("../state.js").Step} one */
function spread(found, one) {
  const { edges, counts } = found.histogram;
  const most = Math.max(...counts, 1);
  const width = 640 / Math.max(counts.length, 1);
  // The root of the count: tails of a few values stay visible beside a peak of millions.
  const tall = (/** @type {number} */ n) => 180 * Math.sqrt(n / most);
  return html`<svg viewBox="0 0 640 210" role="img" aria-label="histogram">
    ${counts.map((n, i) => svg`<rect x=${i * width} y=${180 - tall(n)} width=${Math.max(width - 1, 0.5)}
      height=${tall(n)} class=${edges[i] < 0 ? "minus" : "plus"}><title>${`${short(edges[i])} to ${short(edges[i + 1])}: ${n}`}</title></rect>`)}
    ${[0, 0.25, 0.5, 0.75, 1].map((at) => svg`<text x=${at * 640} y="200"
      text-anchor=${at === 0 ? "start" : at === 1 ? "end" : "middle"}>${short(edges[Math.round(at * counts.length)])}</text>`)}</svg>
    <p class="note">Heights grow with the root of the count.</p>
    <dl class="facts">${[["values", count(one.shape.reduce((a, b) => a * b, 1))], ["smallest", short(found.min)],
      ["largest", short(found.max)], ["mean", short(found.mean)], ["rms", short(found.rms)],
      ["NaN", String(found.nan)], ["infinite", String(found.inf)]].map(([name, value]) =>
        html`<div data-bad=${(name === "NaN") && value !== "0"}><dt>${name}</dt><dd>${value}</dd></div>`)}</dl>`;
}
