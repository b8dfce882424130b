// The whole model at once: its parts with their shapes, the stream's size at each point and token,
// and what comes next.

import { batch, computed, effect, scope, signal } from "../signals.js";
import { html } from "../html.js";
import { get } from "../data/api.js";
import { cell, goTo, layer, live, model, report, room, run, token } from "../state.js";
import { ArrayPlane } from "../data/plane.js";
import { count, rough, short, visible } from "../data/numbers.js";
import { Heatmap } from "./heatmap.js";
import { legendBar } from "./legend.js";
import { pointName } from "./role.js";
import { candidate, candidates } from "./bars.js";

/** @typedef {{points: string[], values: number[][]}} Norms */

/** The answer for the shown run, asked anew for each. @param {(id: string) => string} path */
export function ofRun(path) {
  const found = signal(/** @type {any} */ (null));
  effect(() => {
    const id = run.value?.run;
    found.value = null;
    if (!id) return;
    const control = new AbortController();
    get(path(encodeURIComponent(id)), control.signal).then((answer) => (found.value = answer), report);
    return () => control.abort();
  });
  return found;
}

export function mapRoom() {
  const norms = ofRun((id) => `/api/runs/${id}/norms`);
  const next = candidates(10);
  const grid = html`<div class="fill"></div>`;
  effect(() => {
    grid.replaceChildren();
    if (norms.value) return scope(() => grid.replaceChildren(normMap(norms.peek())));
  });
  return html`<section class="room map" aria-label="map of the model">
    <div class="tower">${() => (model.value ? tower(model.value) : "")}</div>
    <div class="panel"><h2>Size of the residual stream</h2>
      <p class="note">Norm of the stream for each token (across) at each point (upward). A cell opens its vector.</p>${grid}</div>
    <div class="panel next"><h2>After ${() => visible(run.value?.tokens[token.value] ?? "")}</h2>
      <ol class="barlist">${() => next.value?.top.map((one) =>
        candidate(one, Math.max(...next.value?.top.map((c) => c.probability) ?? [1]))) ?? ""}</ol>
      <button class="quiet" @click=${() => (room.value = "parts")}>What made it so probable?</button></div></section>`;
}

/** @param {Norms} norms */
function normMap(norms) {
  const legend = signal(/** @type {any} */ (null));
  const plane = new ArrayPlane(norms.values);
  const tokens = run.peek()?.tokens ?? [];
  const at = signal(/** @type {import("../state.js").Cell | null} */ (null));
  const map = new Heatmap({
    plane, palette: "size", upward: true, label: "norm of the residual stream by point and token",
    rowLabel: (row) => pointName(norms.points[row]), colLabel: (col) => visible(tokens[col] ?? ""),
    say: (row, col, value) => `${pointName(norms.points[row])}, token ${col} '${tokens[col]?.trim()}', norm ${short(value ?? NaN)}`,
    cursor: () => at.value, bend: () => "log", most: 34, widest: 86,
    onLegend: (found) => legend.peek()?.scale.key !== found.scale.key && (legend.value = found),
    pick: (row, col) => batch(() => {
      at.value = { row, col };
      token.value = col;
      live.value = `${pointName(norms.points[row])}, norm ${short(plane.value(row, col) ?? NaN)}`;
      const found = /^layers\.(\d+)/.exec(norms.points[row]);
      if (found) layer.value = Number(found[1]);
    }),
  });
  map.canvas.addEventListener("dblclick", () => openPoint(norms, at.peek()));
  map.canvas.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
    if (event.key === "Enter") openPoint(norms, at.peek());
  });
  return html`<div class="mapbox">${map.element}<p class="open">${() => (at.value ? html`<button
    @click=${() => openPoint(norms, at.peek())}>open ${norms.points[at.value.row]}</button>` : "")}</p>
    ${legendBar(legend, { choice: false })}</div>`;
}

/** @param {Norms} norms @param {import("../state.js").Cell | null} at */
function openPoint(norms, at) {
  if (!at) return;
  goTo(norms.points[at.row]);
  cell.value = null;
}

/** @param {import("../state.js").Model} own */
function tower(own) {
  const inside = computed(() => (run.value?.steps ?? []).filter((s) => s.layer === layer.value));
  const part = (/** @type {string} */ name, /** @type {string} */ shape, /** @type {string} */ id, /** @type {string} */ role) =>
    html`<button class="part" data-role=${role} @click=${() => goTo(id)}><b>${name}</b><span>${shape}</span></button>`;
  const has = (/** @type {string} */ leaf) => inside.value.some((s) => s.id.endsWith(`.${leaf}`));
  return html`<h2>${own.name}</h2>
    <p class="note">${rough(own.parameters)} parameters · ${own.dtype} · ${own.family}</p>
    <div class="parts">
      ${part("head", `${count(own.width)} → ${count(own.vocabulary)}`, "logits", "logits")}
      ${part("final norm", count(own.width), "final_norm", "resid")}
      <div class="blocks"><div class="rungs" role="listbox" aria-label="layers">${Array.from({ length: own.layers }, (_, i) => html`<button
        role="option" aria-selected=${() => String(layer.value === i)} title=${`layer ${i}`} aria-label=${`layer ${i}`}
        @click=${() => (layer.value = i)}></button>`).reverse()}</div>
      <div class="block"><h3>layer ${() => layer.value} <small>of ${own.layers}</small></h3>
        ${() => [
          has("mlp_norm") && part("norm", count(own.width), `layers.${layer.value}.mlp_norm`, "resid"),
          part("MLP", `${count(own.width)} → ${count(own.mlp_width)} → ${count(own.width)}`, `layers.${layer.value}.mlp_out`, "mlp"),
          part("attention", `${own.heads} heads${own.kv_heads === own.heads ? "" : `, ${own.kv_heads} of keys`} × ${own.head_dim}`,
            `layers.${layer.value}.attn.pattern`, "attn"),
          has("attn_norm") && part("norm", count(own.width), `layers.${layer.value}.attn_norm`, "resid")]}
      </div></div>
      ${part("embedding", `${count(own.vocabulary)} × ${count(own.width)}`, "embed", "resid")}
      ${() => part("tokens", `${run.value?.ids.length ?? 0} in this prompt, ${count(own.context)} at most`, "tokens", "place")}
    </div>
    <ul class="features">${own.features.map((feature) => html`<li>${feature}</li>`)}</ul>`;
}
