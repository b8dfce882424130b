// The column beside the stage: what the step's code is, what was checked, how its values spread.

import { effect, signal } from "../signals.js";
import { html } from "../html.js";
import { get } from "../data/api.js";
import { isBridged } from "../data/bridge.js";
import { isRecording } from "../data/recorded.js";
import { card, head, headOf, model, run, step } from "../state.js";
import { count, duration, short, size } from "../data/numbers.js";
import { copyButton } from "./copy.js";

/** @typedef {import("../state.js").Card} Card */
/** @typedef {import("../state.js").Check} Check */

export function readings() {
  const said = signal("");
  effect(() => {
    const [id, one] = [run.value?.run, step.value];
    if (!id || !one) return;
    const control = new AbortController();
    const at = one.shape.length === 3 ? `&head=${headOf(one)}` : `&head=${head.value}`;
    get(`/api/runs/${encodeURIComponent(id)}/card?step=${encodeURIComponent(one.id)}${at}`, control.signal).then(
      (answer) => ((card.value = answer), (said.value = "")),
      (error) => error.name !== "AbortError" && (said.value = error.message));
    return () => control.abort();
  });
  return html`<section class="readings" aria-label="code and checks">
    <p class="note">${said}</p>${() => (card.value ? cardOf(card.value) : "")}
    ${() => (run.value ? facts(run.value) : "")}</section>`;
}

/** @param {Card} one */
function cardOf(one) {
  const { code, walk, source, checks } = one;
  return html`${checks?.length ? html`<h3>Checks</h3><ul class="checks">${checks.map(check)}</ul>` : ""}
    ${code ? html`<h3>Code of this model ${copyButton(() => code)}</h3><pre class="code" tabindex="0">${highlighted(code)}</pre>` : ""}
    ${source?.file ? html`<p class="source"><code>${source.file}:${source.first}</code></p>` : ""}
    ${walk ? html`<details><summary>Written a second time, in the walk</summary><pre class="code" tabindex="0">${highlighted(walk)}</pre></details>` : ""}`;
}

/** @param {Check} one */
function check(one) {
  const value = typeof one.value === "number" ? short(one.value) : one.value ?? "";
  const limit = typeof one.limit === "number" ? short(one.limit) : one.limit;
  return html`<li data-holds=${one.holds}><b>${one.holds ? "✓" : "✗"}</b> ${one.what}
    <span class="number">${value}${limit ? html` <small>≤ ${limit}</small>` : ""}</span></li>`;
}

const WORDS = /(#.*$)|("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')|\b(def|return|if|else|for|in|not|and|or|None|True|False|class|import|from|is|lambda|self)\b|\b(\d[\w.]*)\b/gm;

/** Python with its words set apart. @param {string} code @returns {Node[]} */
function highlighted(code) {
  /** @type {Node[]} */
  const parts = [];
  let end = 0;
  for (const found of code.matchAll(WORDS)) {
    parts.push(document.createTextNode(code.slice(end, found.index)));
    const kind = found[1] ? "comment" : found[2] ? "string" : found[3] ? "word" : "digits";
    parts.push(html`<span class=${kind}>${found[0]}</span>`);
    end = found.index + found[0].length;
  }
  return [...parts, document.createTextNode(code.slice(end))];
}

/** @param {import("../state.js").Run} one */
function facts(one) {
  const own = model.value;
  return html`<h3>This run ${one.python ? copyButton(() => one.python) : ""}</h3>
    <dl class="facts">${[["model", one.model], ["tokens", count(one.ids.length)],
      ["pass", duration(one.seconds)], ["held", size(one.bytes)],
      ["type", own?.dtype ?? ""], ["id", one.run]].map(([name, value]) =>
        html`<div><dt>${name}</dt><dd>${value}</dd></div>`)}</dl>
    <p hidden=${isRecording() || isBridged()}><a href=${`/api/runs/${encodeURIComponent(one.run)}/export`} download=${`pellucid-${one.run}.html`}>
    Save this run as one file</a></p>`;
}
