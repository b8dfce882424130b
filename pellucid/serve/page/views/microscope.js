// One number: its bits, what it was computed from, the same sum in float64, and how far apart.

import { effect, signal } from "../signals.js";
import { html } from "../html.js";
import { get } from "../data/api.js";
import { isRecording } from "../data/recorded.js";
import { address, cell, goToAddress, live, report, run, step } from "../state.js";
import { short } from "../data/numbers.js";
import { copyButton } from "./copy.js";

/**
 * Numbers that JSON has not come as text: "NaN", "Infinity", "-Infinity".
 * @typedef {number | string} Figure
 * @typedef {{what: string, factors: Figure[], product: Figure}} Term
 * @typedef {{address: string, value: Figure, bits: string, shortest: string,
 *   operation: string, formula: string, terms: Term[], rest: {count: number, sum: Figure} | null,
 *   sum: Figure | null, then: {what: string, value: Figure}[], facts: Record<string, Figure>,
 *   float64: Figure | null, ulps: number | null, inputs: string[], weights: string[],
 *   how: string, edited: boolean, python: string}} Arithmetic
 */

const BITS = /** @type {Record<string, [number, number]>} */ ({ // exponent, fraction
  float32: [8, 23], bfloat16: [8, 7], float16: [5, 10], float64: [11, 52] });

export function microscope() {
  const found = signal(/** @type {Arithmetic | null} */ (null));
  const loading = signal(false);
  effect(() => {
    const at = cell.value ? address.value : "";
    const id = run.value?.run;
    if (!at || !id) {
      found.value = null;
      return;
    }
    const control = new AbortController();
    loading.value = true;
    get(`/api/runs/${encodeURIComponent(id)}/cell?at=${encodeURIComponent(at)}`, control.signal)
      .then((answer) => {
        found.value = answer;
        loading.value = false;
        if (!live.peek().endsWith(answer.shortest)) live.value = `${answer.address}, ${answer.shortest}`;
      })
      .catch((error) => {
        loading.value = false;
        if (!isRecording()) report(error);
      });
    return () => control.abort();
  });
  return html`<section class="microscope" aria-label="microscope" aria-busy=${loading}>
    ${() => (found.value ? arithmetic(found.value) : invitation())}</section>`;
}

function invitation() {
  return html`<div class="empty"><h2>Microscope</h2>
    <p>${isRecording() ? "A recording holds values, not their arithmetic: the same address on pellucid serve shows it."
    : "Click a cell, or move with the arrow keys: its value, bits and arithmetic appear here."}</p></div>`;
}

/** @param {Arithmetic} one */
function arithmetic(one) {
  const dtype = step.peek()?.dtype ?? "float32";
  return html`<h2>Microscope</h2>
    <p class="at"><code>${one.address}</code></p>
    <p class="value" data-value=${one.shortest}>${one.shortest.replace("-", "−")}</p>
    ${bits(one.bits, dtype)}
    <p class="operation">${one.operation}</p>
    ${one.formula ? html`<p class="formula">${one.formula}</p>` : ""}
    ${one.terms?.length ? terms(one) : ""}
    ${facts(one)}${check(one)}
    ${one.edited ? html`<p class="note bad">This run changes this tensor, so its arithmetic does not explain it.</p>` : ""}
    ${one.inputs?.length ? html`<h3>Computed from</h3><ul class="inputs">${one.inputs.map(input)}${(one.weights ?? []).map((at) => html`<li><code>${at}</code></li>`)}</ul>` : ""}
    <h3>In Python ${copyButton(() => one.python)}</h3><pre tabindex="0">${one.python}</pre>`;
}

/** @param {string} hex @param {string} dtype */
function bits(hex, dtype) {
  const [exponent, fraction] = BITS[dtype] ?? [0, 0];
  if (!hex || !exponent) return hex ? html`<p class="bits"><code>${hex}</code></p>` : "";
  const text = BigInt(hex).toString(2).padStart(1 + exponent + fraction, "0");
  return html`<p class="bits" title="sign, exponent, fraction"><code>${hex}</code>
    <span class="sign">${text[0]}</span><span class="exponent">${text.slice(1, 1 + exponent)}</span><span
    class="fraction">${text.slice(1 + exponent)}</span> <small>${dtype}</small></p>`;
}

/** @param {Arithmetic} one */
function terms(one) {
  const largest = Math.max(...one.terms.map((term) => Math.abs(Number(term.product))).filter(Number.isFinite), 1e-300);
  return html`<table class="terms"><caption class="spoken">largest terms of the sum</caption><tbody>
    ${one.terms.map((term) => html`<tr title=${term.what}><td class="what">${term.what}</td>
      <td class="factors">${joined(term.factors, one.how)}</td>
      <td class="product">${figure(term.product)}</td>
      <td class="bar">${bar(Number(term.product) / largest)}</td></tr>`)}
    ${one.rest?.count ? html`<tr class="rest"><td class="what">${one.rest.count} smaller</td><td></td>
      <td class="product">${figure(one.rest.sum)}</td><td class="bar">${bar(Number(one.rest.sum) / largest)}</td></tr>` : ""}
    ${one.sum !== null && one.sum !== undefined ? html`<tr class="sum"><td class="what">sum</td><td></td>
      <td class="product">${figure(one.sum)}</td><td></td></tr>` : ""}
    ${one.then?.map((next) => html`<tr class="then" title=${next.what}><td class="what" colspan="2">${next.what}</td>
      <td class="product">${figure(next.value)}</td><td></td></tr>`) ?? ""}</tbody></table>`;
}

/** Factors as they are joined: "a × b", "e^(a − b)". @param {Figure[]} factors @param {string} how */
function joined(factors, how) {
  const [a, b] = factors.map(figure);
  return (how || "a × b").replace(/\b([ab])\b/g, (_, letter) => (letter === "a" ? a : b ?? ""));
}

/** @param {Figure} value */
function figure(value) {
  return short(Number(value));
}

/** The other numbers of an operation, such as the largest score of a softmax. @param {Arithmetic} one */
function facts(one) {
  const rows = Object.entries(one.facts ?? {});
  return rows.length ? html`<dl class="check">${rows.map(([name, value]) => html`<dt>${name}</dt><dd>${figure(value)}</dd>`)}</dl>` : "";
}

/** @param {number} share -1 to 1 */
function bar(share) {
  const width = Math.min(Math.abs(share), 1) * 50;
  return html`<i class=${share < 0 ? "minus" : "plus"}
    css=${`width:${width}%;left:${share < 0 ? 50 - width : 50}%`}></i>`;
}

/** @param {Arithmetic} one */
function check(one) {
  if (one.float64 === null || one.float64 === undefined) return "";
  const { ulps } = one;
  const near = ulps !== null && ulps <= 0.5;
  return html`<dl class="check"><dt>in float64</dt><dd>${String(one.float64).replace("-", "−")}</dd>
    <dt>distance</dt><dd class=${near ? "good" : ""}>${ulps === null ? "—" : `${short(ulps)} ulp${near ? ", rightly rounded" : ""}`}</dd></dl>`;
}

/** @param {string} at */
function input(at) {
  const follow = (/** @type {Event} */ event) => {
    event.preventDefault();
    try {
      goToAddress(at);
    } catch (error) {
      report(error);
    }
  };
  return html`<li><a href="#" @click=${follow}><code>${at}</code></a></li>`;
}
