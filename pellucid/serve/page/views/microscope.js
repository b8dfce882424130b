// One number: its bits, what it was computed from, the same sum in float64, and how far apart.

import { effect, signal } from "../signals.js";
import { html } from "../html.js";
import { get } from "../data/api.js";
import { address, cell, goToAddress, report, run, step } from "../state.js";
import { short } from "../data/numbers.js";
import { formula } from "./formula.js";
import { copyButton } from "./copy.js";

/**
 * @typedef {{what: string, factors: number[], product: number}} Term
 * @typedef {{address: string, value: number | string, bits: string, shortest: string,
 *   operation: string, formula: string, terms: Term[], rest: {count: number, sum: number} | null,
 *   sum: number | null, float64: number | string | null, ulps: number | null, inputs: string[],
 *   python: string}} Arithmetic
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
      .then((answer) => ((found.value = answer), (loading.value = false)))
      .catch((error) => (report(error), (loading.value = false)));
    return () => control.abort();
  });
  return html`<section class="microscope" aria-label="microscope" aria-busy=${loading}>
    ${() => (found.value ? arithmetic(found.value) : invitation())}</section>`;
}

function invitation() {
  return html`<div class="empty"><h2>Microscope</h2>
    <p>Click a cell, or move with the arrow keys: its value, bits and arithmetic appear here.</p></div>`;
}

/** @param {Arithmetic} one */
function arithmetic(one) {
  const dtype = step.peek()?.dtype ?? "float32";
  return html`<h2>Microscope</h2>
    <p class="at"><code>${one.address}</code></p>
    <p class="value" data-value=${one.shortest}>${one.shortest.replace("-", "−")}</p>
    ${bits(one.bits, dtype)}
    <p class="operation">${one.operation}</p>
    ${one.formula ? html`<p class="formula">${formula(one.formula)}</p>` : ""}
    ${one.terms?.length ? terms(one) : ""}
    ${check(one)}
    ${one.inputs?.length ? html`<h3>Computed from</h3><ul class="inputs">${one.inputs.map(input)}</ul>` : ""}
    <h3>In Python ${copyButton(() => one.python)}</h3><pre>${one.python}</pre>`;
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
  const largest = Math.max(...one.terms.map((term) => Math.abs(term.product)), 1e-300);
  return html`<table class="terms"><caption class="spoken">largest terms of the sum</caption><tbody>
    ${one.terms.map((term) => html`<tr><td class="what">${term.what}</td>
      <td class="factors">${term.factors.map(short).join(" × ")}</td>
      <td class="product">${short(term.product)}</td>
      <td class="bar">${bar(term.product / largest)}</td></tr>`)}
    ${one.rest?.count ? html`<tr class="rest"><td class="what">${one.rest.count} smaller terms</td><td></td>
      <td class="product">${short(one.rest.sum)}</td><td class="bar">${bar(one.rest.sum / largest)}</td></tr>` : ""}
    ${one.sum !== null && one.sum !== undefined ? html`<tr class="sum"><td class="what">sum</td><td></td>
      <td class="product">${short(one.sum)}</td><td></td></tr>` : ""}</tbody></table>`;
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
  const ulps = one.ulps ?? 0;
  const near = ulps <= 1;
  return html`<dl class="check"><dt>in float64</dt><dd>${String(one.float64).replace("-", "−")}</dd>
    <dt>distance</dt><dd class=${near ? "good" : ""}>${ulps === 0 ? "none: the nearest number of its type"
      : `${short(ulps)} ulp`}</dd></dl>`;
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
