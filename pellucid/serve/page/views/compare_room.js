// Two runs, of one model or of two, beside each other: both tensors, their difference, and the verdicts of diff.

import { effect, scope, signal } from "../signals.js";
import { html } from "../html.js";
import { get } from "../data/api.js";
import { exact, short, visible } from "../data/numbers.js";
import { adopt, cell, head, live, models, report, rival, run, runs, startRun, step } from "../state.js";
import { dumbbells, heldAgainst, strip } from "./against.js";
import { copyButton } from "./copy.js";
import { layerPicker } from "./ledger.js";
import { legendBar } from "./legend.js";
import { titleOf } from "./role.js";
import { headPicker, stepPicker } from "./stage.js";
import { canBeMasked, picture, planeOf, sayCell } from "./tensor_map.js";

/** @typedef {import("../state.js").Run} Run */
/** @typedef {import("../state.js").Step} Step */
/** @typedef {import("../data/plane.js").TensorPlane} TensorPlane */
const NAMES = /** @type {const} */ (["A", "B", "B − A"]);

export function compareRoom() {
  const other = signal(/** @type {Run | null} */ (null));
  effect(() => followRival(other));
  const against = heldAgainst(() => [run.value, other.value]);
  const found = html`<div class="found"></div>`;
  effect(() => {
    found.replaceChildren();
    const answer = against.value;
    if (answer) return scope(() => found.replaceChildren(verdicts(answer)));
  });
  const beside = html`<div class="beside3"></div>`;
  effect(() => {
    const [one, two, at] = [run.value, other.value, step.value];
    head.value;
    beside.replaceChildren();
    if (one && two && at) return scope(() => beside.replaceChildren(pictures(one, two, at)));
  });
  return html`<section class="room compare" aria-label="two runs beside each other"><div class="panel side">${chooser(other)}${found}</div>
    <div class="panel main"><header class="what"><div class="line"><h1>${() => (step.value ? titleOf(step.value) : "")}</h1>${stepPicker()}</div>
    <div class="line"><code class="dims">${() => step.value?.name ?? ""}</code><span class="row">${layerPicker()}
      ${() => (step.value?.shape.length === 3 ? headPicker() : "")}</span></div></header>
    ${beside}${() => (against.value ? html`<div><h2>In Python ${copyButton(() => against.peek()?.python ?? "")}</h2>
      <pre class="repeat" tabindex="0">${against.value.python}</pre></div>` : "")}</div></section>`;
}

/** Run what the shown run is compared with; at first another model, or another run of this visit. @param {import("../signals.js").Signal<Run | null>} other */
function followRival(other) {
  const one = run.value;
  if (!one) return;
  const spec = rival.value ?? firstRival(one);
  if (!spec) return;
  let gone = false;
  const made = spec.run ? get(`/api/runs/${encodeURIComponent(spec.run)}`).catch(() => started(spec, one)) : started(spec, one);
  made.then((answer) => {
    if (!gone && answer) other.value = answer;
  }, report);
  return () => (gone = true);
}

/** @param {import("../state.js").Rival} spec @param {Run} one */
function started(spec, one) {
  const alike = spec.prompt === null && spec.model === one.model;
  const given = alike ? { ids: one.ids } : { prompt: spec.prompt ?? one.prompt };
  return startRun({ model: spec.model, ...given, edits: spec.edits }, false);
}

/** @param {Run} one @returns {import("../state.js").Rival | null} */
function firstRival(one) {
  const model = models.peek().find((m) => m.name !== one.model);
  if (model) return { model: model.name, prompt: null, edits: [], run: "" };
  const earlier = runs.peek().find((r) => r.run !== one.run);
  return earlier ? asRival(earlier) : null;
}

/** @param {Run} of */
function asRival(of) {
  return { model: of.model, prompt: of.prompt, edits: of.edits, run: of.run };
}

/** @param {import("../signals.js").Signal<Run | null>} other */
function chooser(other) {
  const line = (/** @type {Run | null} */ of) => (of ? html`<b>${of.model}</b> <q>${visible(of.prompt.slice(0, 60))}</q>${of.edits?.length
    ? ` ${of.edits.length} change${of.edits.length > 1 ? "s" : ""}` : ""} <small>${of.ids.length} tokens</small>` : "—");
  const prompt = html`<input class="wide" aria-label="another prompt for B" placeholder="the same prompt">`;
  const choose = (/** @type {string} */ name) => (rival.value = { model: name, prompt: prompt.value || null, edits: [], run: "" });
  prompt.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
    if (event.key === "Enter") choose(rival.peek()?.model ?? other.peek()?.model ?? models.peek()[0].name);
  });
  const swap = () => {
    const [one, two] = [run.peek(), other.peek()];
    if (!one || !two) return;
    rival.value = asRival(one);
    adopt(two);
  };
  return html`<h2>Side by side</h2><dl class="sides"><dt>A</dt><dd>${() => line(run.value)}</dd><dt>B</dt><dd>${() => line(other.value)}</dd></dl>
    <div class="row">${models.peek().map((one) => html`<button aria-pressed=${() => String(other.value?.model === one.name && !rival.value?.run)}
      @click=${() => choose(one.name)}>${one.name}</button>`)}${prompt}</div>
    <div class="row"><label class="choice">or a run of this visit <select aria-label="a run of this visit" @change=${(/** @type {any} */ event) => {
      const found = runs.peek().find((r) => r.run === event.target.value);
      if (found) rival.value = asRival(found);
    }}><option value="">…</option>${() => runs.value.filter((r) => r.run !== run.value?.run).map((r) => html`<option value=${r.run}
      selected=${r.run === rival.value?.run}>${r.model}: ${r.prompt.slice(0, 30)}${r.edits?.length ? ` (${r.edits.length} changes)` : ""}</option>`)}</select></label>
      <button @click=${swap} disabled=${() => !other.value}>A ⇄ B</button></div>
    ${() => (other.value ? "" : html`<p class="note">Start <code>pellucid serve A B</code> for two models, or run another prompt or an experiment:
      it can be chosen here.</p>`)}`;
}

/** @param {import("./against.js").Against} found */
function verdicts(found) {
  const alone = found.only.map((names) => names.length);
  return html`<h3>Verdicts of diff</h3>${strip(found)}
    ${alone[0] + alone[1] ? html`<p class="note">Only in A: ${alone[0]} tensors, only in B: ${alone[1]}.</p>` : ""}
    <h3>Next token <small>○ A ● B</small></h3>${dumbbells(found)}`;
}

/** @param {Run} one @param {Run} two @param {Step} at */
function pictures(one, two, at) {
  const there = two.steps.find((s) => s.name === at.name);
  const planes = [planeOf(at, one)];
  const own = picture(at, planes[0], one, { name: NAMES[0] });
  if (!there) {
    return html`${framed(0, one, own, at)}<p class="note">${two.model} has no ${at.name}.</p>`;
  }
  const alike = String(at.shape) === String(there.shape);
  planes.push(planeOf(there, two));
  const sides = [
    picture(at, planes[0], one, { name: NAMES[0], alike: alike ? planes[1] : undefined }),
    picture(there, planes[1], two, { name: NAMES[1], alike: alike ? planes[0] : undefined })];
  const runsOf = [one, two];
  if (alike && at.dtype !== "bool" && there.dtype !== "bool") {
    planes.push(planeOf(there, two, one.run));
    sides.push(picture(there, planes[2], two, { name: NAMES[2], palette: "signed" }));
    runsOf.push(two);
  }
  if (alike) {
    const maps = sides.map((side) => side.map);
    for (const map of maps) map.mates = maps.filter((mate) => mate !== map);
  }
  return html`${sides.map((side, i) => framed(i, runsOf[i], side, at))}
    ${alike ? "" : html`<p class="note">Shapes ${at.shape.join(" × ")} and ${there.shape.join(" × ")}: there is nothing to subtract.</p>`}
    ${reading(at, one, planes)}`;
}

/** @param {number} i @param {Run} of @param {ReturnType<typeof picture>} side @param {Step} at */
function framed(i, of, side, at) {
  side.box.append(legendBar(side.legend, { masked: canBeMasked(at), choice: i === 2 }));
  return html`<figure><figcaption><b>${NAMES[i]}</b> ${i < 2 ? of.model : "the difference"}</figcaption>${side.box}</figure>`;
}

/** The chosen cell in both, and its difference. @param {Step} at @param {Run} one @param {TensorPlane[]} planes */
function reading(at, one, planes) {
  const values = () => {
    const place = cell.value;
    return place ? planes.map((plane) => (plane.version.value, plane.value(place.row, place.col))) : [];
  };
  effect(() => {
    const place = cell.value;
    const found = values();
    if (!place || !found.length) return;
    const numbers = found.map((value, i) => `${NAMES[i].replace("−", "minus")} ${value === undefined ? "…" : short(value)}`);
    live.value = `${sayCell(at, one)(place.row, place.col, undefined).replace(", …", "")}: ${numbers.join(", ")}`;
  });
  return html`<table class="numbers both"><caption class="spoken">the chosen cell in both runs</caption><thead><tr>
    ${planes.map((_, i) => html`<th scope="col">${NAMES[i]}</th>`)}</tr></thead><tbody><tr>${() => {
      const found = values();
      return found.length ? found.map((value, i) => html`<td data-value=${value === undefined ? "" : exact(value, planes[i].dtype)}>${value === undefined ? "…"
        : exact(value, planes[i].dtype).replace("-", "−")}</td>`) : html`<td colspan="3" class="note">Choose a cell: its numbers in both appear here.</td>`;
    }}</tr></tbody></table>`;
}
