// Experiments: change something inside, run again, and see what it does against the clean run.

import { effect, scope, signal } from "../signals.js";
import { html } from "../html.js";
import { address, modelName, room, run, startRun } from "../state.js";
import { dumbbells, heldAgainst, strip } from "./against.js";
import { copyButton } from "./copy.js";
import { sweeps } from "./sweeps.js";

/** @typedef {import("../state.js").Edit} Edit */
/** @typedef {import("./against.js").Against} Against */

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
  const alike = () => edited.value?.model === clean.value?.model && String(edited.value?.ids) === String(clean.value?.ids);
  const against = heldAgainst(() => (alike() ? [clean.value, edited.value] : [null, null]));
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
    ${() => (edited.value?.python ? html`<h3>In Python ${copyButton(() => edited.peek()?.python ?? "")}</h3><pre tabindex="0">${edited.value.python}</pre>` : "")}`;
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
