// The ledger: every step of one layer and of the way in and out, in the order in which they run.

import { effect } from "../signals.js";
import { html } from "../html.js";
import { goTo, layer, layerBy, ledger, model, run, step } from "../state.js";
import { roleOf, titleOf } from "./role.js";

export function ledgerList() {
  const list = html`<ol class="ledger" aria-label="steps in the order in which they run"></ol>`;
  effect(() => {
    const rows = ledger.value;
    const order = new Map((run.value?.steps ?? []).map((s, i) => [s.id, i + 1]));
    const first = rows.findIndex((s) => s.layer !== null);
    const last = rows.findLastIndex((s) => s.layer !== null);
    list.replaceChildren(...rows.flatMap((s, i) => [
      ...(i === first ? [html`<li class="block">${layerPicker()}</li>`] : []),
      ...(i === last + 1 && first >= 0 ? [html`<li class="block"><span>after the last layer</span></li>`] : []),
      row(s, order.get(s.id) ?? 0)]));
  });
  effect(() => {
    const here = step.value?.id;
    ledger.value;
    for (const one of list.querySelectorAll("[aria-current]")) one.removeAttribute("aria-current");
    const current = list.querySelector(`[data-step="${here}"]`);
    current?.setAttribute("aria-current", "step");
    if (current) keepInView(list, current);
  });
  return list;
}

/** @param {HTMLElement} list @param {HTMLElement} item */
function keepInView(list, item) {
  const box = list.closest(".rail") ?? list;
  const [outer, inner] = [box.getBoundingClientRect(), item.getBoundingClientRect()];
  if (inner.top < outer.top + 90) box.scrollTop += inner.top - outer.top - 90;
  else if (inner.bottom > outer.bottom - 40) box.scrollTop += inner.bottom - outer.bottom + 40;
}

/** @param {import("../state.js").Step} one @param {number} number */
function row(one, number) {
  return html`<li><a href="#" data-step=${one.id} data-role=${roleOf(one.id.replace(/^layers\.\d+\./, ""))}
    @click=${(/** @type {Event} */ event) => (event.preventDefault(), goTo(one.id))}>
    <span class="number">${number}</span><span class="title" title=${() => `${one.id}: ${titleOf(one)}`}>${() => titleOf(one, true)}</span>
    <span class="leaf">${one.id.replace(/^layers\.\d+\.(attn\.|mlp\.)?/, "")}</span></a></li>`;
}

export function layerPicker() {
  const layers = () => model.value?.layers ?? 1;
  return html`<span class="stepper" role="group" aria-label="layer">
    <button title="layer below (↓)" aria-label="layer below" @click=${() => layerBy(-1)}
      disabled=${() => layer.value === 0}>−</button>
    <label>layer <input type="number" min="0" max=${() => layers() - 1} .value=${() => String(layer.value)}
      aria-label="layer" @change=${(/** @type {any} */ event) => setLayer(Number(event.target.value))}></label>
    <span class="of">of ${layers}</span>
    <button title="layer above (↑)" aria-label="layer above" @click=${() => layerBy(1)}
      disabled=${() => layer.value === layers() - 1}>+</button></span>`;
}

/** @param {number} wanted */
function setLayer(wanted) {
  layer.value = Math.min(Math.max(Math.round(wanted) || 0, 0), (model.peek()?.layers ?? 1) - 1);
}
