// The stage: one step, with the picture that fits its kind.

import { computed, effect, scope } from "../signals.js";
import { html } from "../html.js";
import { card, head, headBy, headOf, ledger, model, picture, run, step, stepBy } from "../state.js";
import { formula } from "./formula.js";
import { roleOf, titleOf } from "./role.js";
import { headStrip } from "./head_strip.js";
import { tensorMap } from "./tensor_map.js";
import { reads } from "./reads.js";
import { rays } from "./rays.js";
import { bars } from "./bars.js";
import { histogram } from "./histogram.js";
import { tensorTable } from "./tensor_table.js";
import { bigTokens } from "./big_tokens.js";

/** @typedef {import("../state.js").Step} Step */

/** Pictures that a step can have beside the one it begins with. @param {Step} one */
export function picturesOf(one) {
  if (one.kind === "tokens" || one.id === "tokens") return ["tokens", "table"];
  if (one.kind === "logits" || one.dims.at(-1) === "V") return ["bars", "heat map", "values"];
  if (/_rotated$/.test(one.id)) return ["rays", "heat map", "table", "values"];
  if (one.dims.at(-1) === "S" && one.shape.length === 3) return ["heat map", "table", "values"];
  return ["heat map", "table", "values"];
}

export const shownPicture = computed(() => {
  const one = step.value;
  if (!one) return "";
  const known = picturesOf(one);
  return known.includes(picture.value) ? picture.value : known[0];
});

export function stage() {
  const body = html`<div class="picture"></div>`;
  let shown = run.peek();
  let times = 0; // the same run comes anew when the server is back
  const what = computed(() => {
    const one = step.value;
    if (run.value !== shown) times++;
    shown = run.value;
    return one ? [times, one.id, one.shape.length === 3 ? headOf(one) : 0, shownPicture.value].join(" ") : "";
  });
  effect(() => {
    body.replaceChildren();
    if (!what.value) return;
    const one = /** @type {Step} */ (step.peek());
    return scope(() => body.replaceChildren(draw(one, shownPicture.peek())));
  });
  const layerHeads = computed(() => {
    const one = step.value;
    what.value;
    return one && one.shape.length === 3 ? `${times} ${one.id}` : "";
  });
  const strip = html`<div class="strip"></div>`;
  effect(() => {
    strip.replaceChildren();
    if (!layerHeads.value) return;
    const one = /** @type {Step} */ (step.peek());
    return scope(() => strip.replaceChildren(headStrip(one)));
  });
  return html`<section class="stage" aria-label="step">${title()}${strip}${body}</section>`;
}

/** @param {Step} one @param {string} kind @returns {Node} */
function draw(one, kind) {
  if (kind === "tokens") return bigTokens();
  if (kind === "bars") return bars();
  if (kind === "table") return tensorTable(one);
  if (kind === "values") return histogram(one);
  if (kind === "rays") return rays(one);
  const map = tensorMap(one);
  if (/attn\.pattern$/.test(one.id)) return html`<div class="beside">${map}${reads(one)}</div>`;
  return map;
}

/** The step before and the next one, and where in the ledger this is. */
export function stepPicker() {
  const place = computed(() => {
    const rows = ledger.value;
    return { at: rows.findIndex((s) => s.id === step.value?.id) + 1, of: rows.length };
  });
  return html`<span class="stepper walk"><button title="step before (k)" aria-label="step before"
    @click=${() => stepBy(-1)}>‹</button><span class="of">${() => `${place.value.at} / ${place.value.of}`}</span><button
    title="next step (j)" aria-label="next step" @click=${() => stepBy(1)}>›</button></span>`;
}

function title() {
  return html`<header class="what" data-role=${() => roleOf((step.value?.id ?? "").replace(/^layers\.\d+\./, ""))}>
    <div class="line"><h1>${() => (step.value ? titleOf(step.value) : "")}</h1>
      ${stepPicker()}</div>
    <div class="line"><p class="sentence">${() => step.value?.sentence ?? ""}</p>${pictureChoice()}</div>
    <div class="line"><code class="dims">${() => dims(step.value)}</code>
      <span class="formula">${() => formula(shownFormula(step.value))}</span></div></header>`;
}

/** The card's formula has the shapes at hand. @param {Step | null} one */
function shownFormula(one) {
  return (card.value && card.value.step === one?.id ? card.value.formula : one?.formula) ?? "";
}

/** @param {Step | null} one */
function dims(one) {
  if (!one) return "";
  return `${one.dims.map((letter, i) => `${letter} ${one.shape[i]}`).join(" × ")} · ${one.dtype}`;
}

function pictureChoice() {
  return html`<span class="tabs small" role="tablist" aria-label="picture">${() => {
    const one = step.value;
    return one ? picturesOf(one).map((name) => html`<button role="tab"
      aria-selected=${() => String(shownPicture.value === name)}
      @click=${() => (picture.value = name)}>${name}</button>`) : "";
  }}</span>`;
}

/** Head stepper for those who have no strip. */
export function headPicker() {
  return html`<span class="stepper" role="group" aria-label="head">
    <button title="head before ([)" aria-label="head before" @click=${() => headBy(-1)}>−</button>
    <span>head ${() => head.value}</span><span class="of">of ${() => model.value?.heads ?? 1}</span>
    <button title="next head (])" aria-label="next head" @click=${() => headBy(1)}>+</button></span>`;
}

