// Sweeps: the same change at every place, and what each does to the chosen token.

import { scope, effect, signal } from "../signals.js";
import { html } from "../html.js";
import { get, post } from "../data/api.js";
import { busy, chosenToken, live, modelName, report, startRun, token } from "../state.js";
import { ArrayPlane } from "../data/plane.js";
import { short, visible } from "../data/numbers.js";
import { Heatmap } from "./heatmap.js";
import { legendBar } from "./legend.js";
import { copyButton } from "./copy.js";

/** @typedef {{rows: (string | number)[], columns: (string | number)[], over: string, values: number[][], unit: string, clean: number, python: string}} Sweep */

/** @param {import("../signals.js").Signal<import("../state.js").Run | null>} clean */
export function sweeps(clean) {
  const found = signal(/** @type {Sweep | null} */ (null));
  const box = html`<div class="fill"></div>`;
  effect(() => {
    box.replaceChildren();
    const answer = found.value;
    if (answer) return scope(() => box.replaceChildren(sweepMap(answer)));
  });
  const over = html`<select aria-label="over"><option value="layer,head">layer × head</option><option value="layer,position">layer × position</option></select>`;
  const what = html`<select aria-label="change"><option value="ablate">ablate</option><option value="patch">patch from</option></select>`;
  const of = html`<select aria-label="tensor"><option>z</option><option>attn_out</option><option>mlp_out</option><option>resid_pre</option></select>`;
  const other = html`<input aria-label="the other prompt" placeholder="another prompt, for patching">`;
  over.addEventListener("change", () => (of.value = over.value === "layer,head" ? "z" : "resid_pre"));
  return html`<h2>Sweep</h2><div class="row">${what} ${of} over ${over} ${other}
    <button class="primary" @click=${() => sweep({ clean, found, what, over, of, other })}>Sweep</button></div>
    <p class="note">${() => (found.value ? html`The chosen token's logit after each change; colours show the difference to the clean ${short(found.value.clean)}.
      ${copyButton(() => found.peek()?.python ?? "")}` : "One run per cell: what each place does to the chosen token.")}</p>${box}`;
}

/** @param {any} form */
async function sweep({ clean, found, what, over, of, other }) {
  const base = clean.peek();
  if (!base) return;
  const from = what.value === "patch" ? await startRun({ model: modelName.peek(), prompt: other.value }, false) : null;
  if (what.value === "patch" && !from) return;
  const control = new AbortController();
  const mine = { what: "sweeping", since: performance.now(), stop: () => control.abort() };
  busy.value = mine;
  try {
    const row = Math.min(token.peek(), base.ids.length - 1);
    const best = chosenToken.peek() ?? (await get(`/api/runs/${base.run}/logits?row=${row}&top=1`)).top[0].id;
    found.value = await post(`/api/runs/${base.run}/sweep`,
      { what: what.value, over: over.value, of: of.value, token: best, row, ...(from ? { from: from.run } : {}) }, control.signal);
  } catch (error) {
    report(error);
  } finally {
    if (busy.peek() === mine) busy.value = null;
  }
}

/** @param {Sweep} found */
function sweepMap(found) {
  const legend = signal(/** @type {any} */ (null));
  const at = signal(/** @type {import("../state.js").Cell | null} */ (null));
  const named = (/** @type {string | number} */ column) => (found.over === "layer,head" ? `head ${column}` : visible(String(column)));
  const rowName = (/** @type {string | number} */ row) => String(row).replace("layers.", "layer ");
  const say = (/** @type {number} */ row, /** @type {number} */ col) => `${rowName(found.rows[row])}, ${named(found.columns[col])}: ${short(found.values[row][col])}, ${short(found.values[row][col] - found.clean)} against the clean run`;
  const map = new Heatmap({
    plane: new ArrayPlane(found.values.map((row) => row.map((value) => value - found.clean))), palette: "signed", upward: true, label: "sweep", most: 44, widest: 80,
    rowLabel: (row) => rowName(found.rows[row]), colLabel: (col) => named(found.columns[col]),
    say, cursor: () => at.value, bend: () => "sym",
    onLegend: (next) => legend.peek()?.scale.key !== next.scale.key && (legend.value = next),
    pick: (row, col) => {
      at.value = { row, col };
      live.value = say(row, col);
    },
  });
  return html`<div class="mapbox short">${map.element}${legendBar(legend, { choice: false })}</div>`;
}
