// Generate: token by token, back and forth in time, with what else could have come at each.

import { batch, effect, signal } from "../signals.js";
import { html } from "../html.js";
import { events } from "../data/api.js";
import { Tree } from "../data/tree.js";
import { live, modelName, report, room, run, startRun } from "../state.js";
import { percent, short, visible } from "../data/numbers.js";

const tree = new Tree(); // outlives the room: one may look elsewhere and come back
const at = signal(0); // the token of the shown branch that is looked at
const settings = signal({ max_tokens: 40, temperature: 0.8, top_k: 50, top_p: 1, seed: 1 });
const writing = signal(/** @type {AbortController | null} */ (null));
let ofRun = "";

export function generateRoom() {
  effect(() => {
    const id = run.value?.run ?? "";
    if (id === ofRun) return;
    ofRun = id;
    writing.peek()?.abort();
    tree.clear();
    at.value = 0;
  });
  return html`<section class="room generate" aria-label="generate"><div class="panel main">
    <header class="settings">${form()}</header>${scrubber()}
    <div class="text">${() => text()}</div>${branches()}</div>
    <div class="panel side">${() => alternatives()}</div></section>`;
}

function form() {
  const field = (/** @type {keyof ReturnType<typeof settings.peek>} */ name, /** @type {string} */ label, /** @type {number} */ step) =>
    html`<label>${label} <input type="number" min="0" step=${step} .value=${() => String(settings.value[name])}
      @change=${(/** @type {any} */ event) => (settings.value = { ...settings.peek(), [name]: Number(event.target.value) })}></label>`;
  return html`${field("max_tokens", "tokens", 1)}${field("temperature", "temperature", 0.1)}
    ${field("top_k", "top k", 1)}${field("top_p", "top p", 0.05)}${field("seed", "seed", 1)}
    ${() => (writing.value ? html`<button class="primary" @click=${() => writing.peek()?.abort()}>Stop</button>`
      : html`<button class="primary" @click=${() => write(tree.begin(null, 0), [])}>Generate</button>`)}`;
}

/**
 * Write on after the prompt and `given` tokens.
 * @param {number} branch
 * @param {number[]} given
 */
async function write(branch, given) {
  writing.peek()?.abort();
  const control = new AbortController();
  writing.value = control;
  const { top_k, ...rest } = settings.peek();
  const ids = [...(run.peek()?.ids ?? []), ...given];
  const body = { model: modelName.peek(), ids, alternatives: 8, ...rest, ...(top_k ? { top_k } : {}) };
  const follow = at.peek() >= given.length - 1;
  try {
    for await (const event of events("/api/generate", body, control.signal)) {
      if (event.done) tree.end(branch, event.finish_reason);
      else tree.add(branch, event);
      const length = tree.branches.peek()[branch].tokens.length;
      if (follow && !event.done && tree.shown.peek() === branch) at.value = length - 1;
    }
  } catch (error) {
    tree.end(branch, control.signal.aborted ? "stopped" : "error");
    report(error);
  } finally {
    if (writing.peek() === control) writing.value = null;
  }
}

function scrubber() {
  const length = () => tree.branch?.tokens.length ?? 0;
  return html`<div class="scrub"><button title="back (,)" aria-label="token before" @click=${() => scrubBy(-1)}>◂</button>
    <input type="range" min="0" max=${() => Math.max(0, length() - 1)} .value=${() => String(at.value)}
      aria-label="generated token" @input=${(/** @type {any} */ event) => (at.value = Number(event.target.value))}>
    <button title="forward (.)" aria-label="next token" @click=${() => scrubBy(1)}>▸</button>
    <span class="of">${() => (length() ? `${at.value + 1} / ${length()}` : "")}</span></div>`;
}

/** @param {number} by */
export function scrubBy(by) {
  const most = (tree.branch?.tokens.length ?? 1) - 1;
  at.value = Math.min(Math.max(at.peek() + by, 0), Math.max(most, 0));
  const one = tree.branch?.tokens[at.peek()];
  if (one) live.value = `token ${at.peek()} '${one.text}', ${percent(one.probability)}`;
}

function text() {
  const branch = tree.branch;
  const from = branch?.from === null ? 0 : branch?.at ?? 0;
  return html`<p class="written"><span class="prompt">${run.value?.tokens.map((one) => html`<span>${one}</span>`)}</span>${
    branch?.tokens.map((one, i) => html`<span class="token" role="button" tabindex="0" data-shared=${i < from}
      data-sure=${one.probability > 0.5 ? "yes" : one.probability > 0.1 ? "half" : "no"} aria-current=${() => String(at.value === i)}
      data-later=${() => String(i > at.value)} title=${percent(one.probability)} @click=${() => (at.value = i)} @keydown=${(/** @type {KeyboardEvent} */ event) => event.key === "Enter" && (at.value = i)}>${one.text}</span>`) ?? ""}</p>
    ${branch ? html`<p class="note">${pace(branch)}</p>` : html`<p class="note">Nothing is generated yet.
      Each token keeps its alternatives: choose one and the text goes on from there as a branch of its own.</p>`}`;
}

/** @param {import("../data/tree.js").Branch} branch */
function pace(branch) {
  const times = branch.tokens.map((one) => one.seconds).filter((one) => one > 0);
  const mean = times.reduce((a, b) => a + b, 0) / Math.max(times.length, 1);
  return `${branch.tokens.length} tokens${times.length ? `, ${short(mean * 1000)} ms each` : ""}`
    + `${branch.finish ? `; ended: ${branch.finish}` : "; writing…"} · seed ${settings.peek().seed}, temperature ${settings.peek().temperature}`;
}

function alternatives() {
  const branch = tree.branch;
  const one = branch?.tokens[at.value];
  if (!branch || !one) return html`<h2>Alternatives</h2><p class="note">They appear with the first token.</p>`;
  const most = Math.max(...one.alternatives.map((choice) => choice.probability), one.probability, 1e-9);
  const here = at.value;
  return html`<h2>Token ${here + 1}: ${visible(one.text)}</h2>
    <p class="note">Choose another and the text goes on from it.</p>
    <ol class="barlist">${one.alternatives.map((choice) => html`<li tabindex="0" role="button" aria-current=${choice.id === one.id}
      @click=${() => branchAt(here, choice)} @keydown=${(/** @type {KeyboardEvent} */ event) => event.key === "Enter" && branchAt(here, choice)}>
      <bdi>${visible(choice.text)}</bdi><small>${choice.id}</small><span class="track"><i css=${`width:${(choice.probability / most) * 100}%`}></i></span>
      <span class="number">${percent(choice.probability)}</span></li>`)}</ol>
    <h3>KV cache</h3>${cacheBar(one, here)}
    <button class="quiet" @click=${() => openHere(branch.tokens.slice(0, here + 1).map((token) => token.id))}>Look inside this pass</button>`;
}

/** @param {import("../data/tree.js").Written} one @param {number} here */
function cacheBar(one, here) {
  const all = (run.peek()?.ids.length ?? 0) + here;
  const computed = Math.max(all - one.cached, 0);
  return html`<div class="cache" role="img" aria-label=${`${one.cached} rows read, ${computed} computed`}>
    <i css=${`flex:${one.cached}`}></i><b css=${`flex:${Math.max(computed, 0.3)}`}></b></div>
    <p class="note">${one.cached} rows read from the cache, ${computed} computed${one.seconds ? ` in ${short(one.seconds * 1000)} ms` : ""}.</p>`;
}

/** @param {number} here @param {import("../data/tree.js").Choice} choice */
function branchAt(here, choice) {
  const from = tree.branch;
  if (!from || choice.id === from.tokens[here].id) return;
  batch(() => {
    const left = from.tokens[here];
    const made = tree.begin(from.name, here);
    tree.add(made, { ...left, ...choice });
    at.value = here;
    write(made, tree.branches.peek()[made].tokens.map((token) => token.id));
  });
}

function branches() {
  return html`<nav class="tree" aria-label="branches">${() => (tree.branches.value.length < 2 ? "" : tree.branches.value.map((one) => html`<button
    css=${`margin-left:${tree.depth(one) * 18}px`} aria-current=${String(tree.shown.value === one.name)}
    @click=${() => batch(() => { tree.shown.value = one.name; at.value = Math.min(at.peek(), one.tokens.length - 1); })}>
    <small>${one.from === null ? "from the prompt" : `after ${one.at} tokens`}</small>
    ${one.tokens.slice(one.at, one.at + 9).map((token) => token.text).join("")}…</button>`))}</nav>`;
}

/** Make a run of the text up to a token. @param {number[]} written */
async function openHere(written) {
  const ids = [...(run.peek()?.ids ?? []), ...written];
  if (await startRun({ model: modelName.peek(), ids })) room.value = "map";
}
