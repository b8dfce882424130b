// Two runs held against each other: the next token's probabilities, and every tensor's verdict as a strip.

import { effect, signal } from "../signals.js";
import { html } from "../html.js";
import { layerOf } from "../address.js";
import { get } from "../data/api.js";
import { goTo, report, step } from "../state.js";
import { percent, short, visible } from "../data/numbers.js";

/**
 * @typedef {{name: string, verdict: string, largest: number | null, relative: number | null, identical: boolean}} Verdict
 * @typedef {{id: number, text: string, before: number | null, after: number | null}} Moved
 * @typedef {{rows: Verdict[], first: string | null, first_diverged: string | null, only: [string[], string[]],
 *   probabilities: Moved[], python: string}} Against
 * @typedef {import("../state.js").Run} Run
 */

/** The second run held against the first, asked anew for each pair. @param {() => (Run | null)[]} pair */
export function heldAgainst(pair) {
  const found = signal(/** @type {Against | null} */ (null));
  effect(() => {
    const [one, two] = pair();
    found.value = null;
    if (!one || !two) return;
    const control = new AbortController();
    get(`/api/runs/${encodeURIComponent(one.run)}/against/${encodeURIComponent(two.run)}`, control.signal)
      .then((answer) => (found.value = answer), report);
    return () => control.abort();
  });
  return found;
}

/** @param {Against} found */
export function dumbbells(found) {
  const most = Math.max(...found.probabilities.flatMap((one) => [one.before ?? 0, one.after ?? 0]), 1e-9);
  return html`<ol class="barlist pairs">${found.probabilities.map((one) => {
    const [before, after] = [one.before ?? 0, one.after ?? 0].map((share) => (share / most) * 100);
    return html`<li><bdi>${visible(one.text)}</bdi><small>${one.id}</small><span class="track">
      <i class=${after < before ? "minus" : "plus"} css=${`left:${Math.min(before, after)}%;width:${Math.abs(after - before)}%`}></i>
      <em css=${`left:${before}%`}></em><b css=${`left:${after}%`}></b></span>
      <span class="number soft">${shareOf(one.before)}</span><span class="number">${shareOf(one.after)}</span></li>`;
  })}</ol>`;
}

/** @param {number | null} share null: the other's tokenizer has no such token */
function shareOf(share) {
  return share === null ? "no such token" : percent(share);
}

/** @param {Against} found */
export function strip(found) {
  const judged = found.rows.some((one) => one.verdict !== "not-judged");
  const said = signal(summary(found));
  const largest = Math.max(...found.rows.map((one) => Number(one.relative)).filter(Number.isFinite), 1e-12);
  /** @type {Map<string, Verdict[]>} */
  const lines = new Map(); // a line a layer, and what stands before and after
  for (const one of found.rows) {
    const at = layerOf(one.name);
    const line = at !== null ? `layer ${at}` : lines.size < 2 && !lines.has("layer 0") ? "before" : "after";
    lines.set(line, [...(lines.get(line) ?? []), one]);
  }
  const chosen = () => step.value?.name;
  const cell = (/** @type {Verdict} */ one) => html`<li><button data-verdict=${kindOf(one)} aria-label=${tell(one)}
    css=${`--strength:${strength(one, largest)}`} aria-current=${() => String(chosen() === one.name)}
    @mouseenter=${() => (said.value = tell(one))} @focus=${() => (said.value = tell(one))} @click=${() => goTo(one.name)}></button></li>`;
  return html`<p class="note verdict" role="status">${said}</p>
    <p class="note keys3"><i data-verdict="same"></i>same numbers <i data-verdict="follows"></i>${judged
      ? "differs as its inputs do" : "differs"} ${judged ? html`<span><i data-verdict="own"></i>differs by itself</span>`
      : html`<span><i data-verdict="shape"></i>another shape</span>`}</p>
    <div class="verdicts" aria-label="verdicts in the order of the pass">${[...lines].reverse().map(([name, line]) =>
      html`<div><small>${name}</small><ul aria-label=${name}>${line.map(cell)}</ul></div>`)}</div>`;
}

/** @param {Against} found */
function summary(found) {
  if (!found.first) return "nothing differs";
  const own = found.first_diverged;
  return `first difference: ${found.first}${own && own !== found.first ? `; first that its own inputs do not explain: ${own}` : ""}`;
}

/** How strongly a difference is shown: six decades up to the largest. @param {Verdict} one @param {number} largest */
function strength(one, largest) {
  if (one.identical) return 0;
  return Math.max(0.15, Math.min(1, 1 + Math.log10(Number(one.relative) / largest || 1e-9) / 6));
}

/**
 * The verdict of diff is about a tensor's own operation: whether it gives these values from the
 * inputs it had. A tensor can differ from the other run and yet follow from its inputs.
 * @param {Verdict} one
 */
function kindOf(one) {
  if (one.identical) return "same";
  if (one.largest === null) return "shape";
  return one.verdict === "diverged" ? "own" : "follows";
}

/** @param {Verdict} one */
function tell(one) {
  const kind = kindOf(one);
  if (kind === "same") return `${one.name}: the same numbers`;
  if (kind === "shape") return `${one.name}: another shape`;
  const how = kind === "own" ? "differs by itself" : one.verdict === "not-judged" ? "differs" : "differs as its inputs do";
  return `${one.name}: ${how}, largest difference ${short(Number(one.largest))}, relative ${short(Number(one.relative))}`;
}
