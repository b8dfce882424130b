// Experiments: change something inside, run again, and see what it does against the clean run.

import { effect, scope, signal } from "../signals.js";
import { html } from "../html.js";
import { layerOf } from "../address.js";
import { get } from "../data/api.js";
import { address, goTo, modelName, report, room, run, startRun } from "../state.js";
import { percent, short, visible } from "../data/numbers.js";
import { copyButton } from "./copy.js";
import { sweeps } from "./sweeps.js";

/** @typedef {import("../state.js").Edit} Edit */
/**
 * @typedef {{name: string, verdict: string, largest: number | null, relative: number | null, identical: boolean}} Verdict
 * @typedef {{rows: Verdict[], first: string | null, first_diverged: string | null, probabilities: {id: number, text: string, before: number, after: number}[]}} Against
 */

const draft = signal(/** @type {Edit[]} */ ([]));
const clean = signal(/** @type {import("../state.js").Run | null} */ (null));
const edited = signal(/** @type {import("../state.js").Run | null} */ (null));

export function tryRoom() {
  effect(() => {
    const now = run.value;
    if (!now) return;
    if (!now.edits?.length) clean.value = now;
    else edited.value = now;
  });
  const against = signal(/** @type {Against | null} */ (null));
  effect(() => {
    const [a, b] = [edited.value, clean.value];
    against.value = null;
    if (!a || !b || a.model !== b.model) return;
    const control = new AbortController();
    get(`/api/runs/${encodeURIComponent(a.run)}/against/${encodeURIComponent(b.run)}`, control.signal)
      .then((answer) => (against.value = answer), report);
    return () => control.abort();
  });
  const found = html`<div></div>`;
  effect(() => {
    found.replaceChildren();
    const answer = against.value;
    if (answer) return scope(() => found.replaceChildren(results(answer)));
  });
  return html`<section class="room try" aria-label="experiment"><div class="panel side">${editor()}</div>
    <div class="panel main">${found}${() => (against.value ? "" : html`<p class="note">Add a change on the left and run it:
      how the next token's probabilities move and which tensors differ appears here.</p>`)}${sweeps(clean)}</div></section>`;
}

const WHAT = /** @type {const} */ ([["zero", "ablate (set to 0)"], ["scale", "scale by"], ["patch", "patch from another run"], ["steer", "steer along a direction"]]);

function editor() {
  const how = signal(/** @type {Edit["do"]} */ ("zero"));
  const said = signal("");
  const at = html`<input class="wide" aria-label="address of what is changed" value=${address.peek() || "layers.0.attn.z[0]"} spellcheck="false">`;
  const value = html`<input type="number" step="0.5" value="2" aria-label="factor">`;
  const direction = html`<input class="wide" aria-label="address of the direction" placeholder="layers.8.resid_post[3]" spellcheck="false">`;
  const other = html`<input class="wide" aria-label="the other prompt" placeholder="another prompt">`;
  const add = async () => {
    said.value = "";
    /** @type {Edit} */
    const edit = { at: at.value.trim(), do: how.peek() };
    if (edit.do === "scale" || edit.do === "steer") edit.value = Number(value.value);
    if (edit.do === "steer") edit.direction = direction.value.trim();
    if (edit.do === "patch") {
      const from = await startRun({ model: modelName.peek(), prompt: other.value }, false);
      if (!from) return;
      edit.from = from.run;
    }
    draft.value = [...draft.peek(), edit];
  };
  return html`<h2>Change</h2><label>what <select .value=${how} @change=${(/** @type {any} */ event) => (how.value = event.target.value)}>
      ${WHAT.map(([name, text]) => html`<option value=${name}>${text}</option>`)}</select></label>
    <label>where ${at}</label>
    ${() => (how.value === "scale" || how.value === "steer" ? html`<label>by ${value}</label>` : "")}
    ${() => (how.value === "steer" ? html`<label>along ${direction}</label>` : "")}
    ${() => (how.value === "patch" ? html`<label>from the prompt ${other}</label>` : "")}
    <button @click=${add}>Add this change</button><p class="note bad">${said}</p>
    <h3>Changes of this experiment</h3>
    <ul class="edits">${() => (draft.value.length ? draft.value.map((edit, i) => html`<li><code>${describe(edit)}</code>
      <button class="copy" aria-label="remove" @click=${() => (draft.value = draft.peek().filter((_, j) => j !== i))}>remove</button></li>`)
      : html`<li class="note">none yet</li>`)}</ul>
    <div class="row"><button class="primary" disabled=${() => !draft.value.length} @click=${runEdited}>Run the experiment</button>
    ${() => (run.value?.edits?.length ? html`<button @click=${backToClean}>Back to the clean run</button>` : "")}</div>
    ${() => (edited.value?.python ? html`<h3>In Python ${copyButton(() => edited.peek()?.python ?? "")}</h3><pre>${edited.value.python}</pre>` : "")}`;
}

/** @param {Edit} edit */
function describe(edit) {
  const by = edit.do === "scale" ? ` × ${edit.value}` : edit.do === "steer" ? ` ${edit.value} × ${edit.direction}` : edit.do === "patch" ? ` from ${edit.from}` : "";
  return `${edit.do} ${edit.at}${by}`;
}

async function runEdited() {
  const base = clean.peek();
  if (!base) return;
  await startRun({ model: base.model, ids: base.ids, edits: draft.peek(), like: base.run });
  room.value = "try";
}

async function backToClean() {
  const base = clean.peek();
  if (base) await startRun({ model: base.model, ids: base.ids });
}

/** @param {Against} found */
function results(found) {
  return html`<h2>Next token, before and after</h2>${dumbbells(found)}
    <h2>Every tensor against the clean run</h2>${strip(found)}`;
}

/** @param {Against} found */
function dumbbells(found) {
  const most = Math.max(...found.probabilities.flatMap((one) => [one.before, one.after]), 1e-9);
  return html`<ol class="barlist pairs">${found.probabilities.map((one) => {
    const [low, high] = [Math.min(one.before, one.after) / most, Math.max(one.before, one.after) / most];
    return html`<li><bdi>${visible(one.text)}</bdi><small>${one.id}</small><span class="track">
      <i class=${one.after < one.before ? "minus" : "plus"} css=${`left:${low * 100}%;width:${(high - low) * 100}%`}></i>
      <em css=${`left:${(one.before / most) * 100}%`}></em><b css=${`left:${(one.after / most) * 100}%`}></b></span>
      <span class="number soft">${percent(one.before)}</span><span class="number">${percent(one.after)}</span></li>`;
  })}</ol>`;
}

/** @param {Against} found */
function strip(found) {
  const said = signal(found.first ? `first difference: ${found.first}${found.first_diverged && found.first_diverged !== found.first ? `; first that its own inputs do not explain: ${found.first_diverged}` : ""}` : "nothing differs");
  const largest = Math.max(...found.rows.map((one) => Number(one.relative)).filter(Number.isFinite), 1e-12);
  /** @type {Map<string, Verdict[]>} */
  const lines = new Map(); // a line a layer, and what stands before and after
  for (const one of found.rows) {
    const at = layerOf(one.name);
    const line = at !== null ? `layer ${at}` : lines.size < 2 && !lines.has("layer 0") ? "before" : "after";
    lines.set(line, [...(lines.get(line) ?? []), one]);
  }
  const cell = (/** @type {Verdict} */ one) => html`<button role="listitem"
    data-verdict=${kindOf(one)} aria-label=${tell(one)} css=${`--strength:${strength(one, largest)}`}
    @mouseenter=${() => (said.value = tell(one))} @focus=${() => (said.value = tell(one))} @click=${() => goTo(one.name)}></button>`;
  return html`<p class="note" role="status">${said}</p>
    <p class="note keys3"><i data-verdict="same"></i>same numbers <i data-verdict="follows"></i>differs as its inputs do
      <i data-verdict="own"></i>changed by itself</p>
    <div class="verdicts" role="list" aria-label="verdicts in the order of the pass">${[...lines].reverse().map(([name, line]) =>
      html`<div><small>${name}</small>${line.map(cell)}</div>`)}</div>`;
}

/** How strongly a difference is shown: six decades up to the largest. @param {Verdict} one @param {number} largest */
function strength(one, largest) {
  if (one.identical) return 0;
  return Math.max(0.15, Math.min(1, 1 + Math.log10(Number(one.relative) / largest || 1e-9) / 6));
}

/**
 * The verdict of diff is about a tensor's own operation: whether it gives these values from the
 * inputs it had. A tensor can differ from the clean run and yet follow from its inputs.
 * @param {Verdict} one
 */
function kindOf(one) {
  if (one.identical) return "same";
  return one.verdict === "diverged" ? "own" : "follows";
}

/** @param {Verdict} one */
function tell(one) {
  return one.identical ? `${one.name}: the same numbers`
    : `${one.name}: ${kindOf(one) === "own" ? "changed by itself" : "differs as its inputs do"}, largest difference ${short(Number(one.largest))}, relative ${short(Number(one.relative))}`;
}

