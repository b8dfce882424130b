// The most probable next tokens after the chosen one, as bars: logit and probability.

import { batch, effect, signal } from "../signals.js";
import { html } from "../html.js";
import { get } from "../data/api.js";
import { cell, chosenToken, report, room, run, step, token } from "../state.js";
import { percent, short, visible } from "../data/numbers.js";

/** @typedef {{id: number, text: string, logit: number, probability: number}} Candidate */

/**
 * Candidates for the token after the chosen one, kept up to date.
 * @param {number} top
 */
export function candidates(top) {
  const found = signal(/** @type {{top: Candidate[], entropy: number} | null} */ (null));
  effect(() => {
    const [id, row] = [run.value?.run, token.value];
    if (!id) return;
    const control = new AbortController();
    get(`/api/runs/${encodeURIComponent(id)}/logits?row=${row}&top=${top}`, control.signal)
      .then((answer) => (found.value = answer), report);
    return () => control.abort();
  });
  return found;
}

export function bars() {
  const found = candidates(24);
  return html`<div class="logits">${() => (found.value ? list(found.value.top, found.value.entropy) : "")}</div>`;
}

/** @param {Candidate[]} top @param {number} entropy nats */
function list(top, entropy) {
  const most = Math.max(...top.map((one) => one.probability), 1e-9);
  const shown = top.reduce((sum, one) => sum + one.probability, 0);
  return html`<p class="note">After token ${token.peek()} ${visible(run.peek()?.tokens[token.peek()] ?? "")}:
    the ${top.length} most probable, together ${percent(shown)}; entropy ${short(entropy)} nats.</p>
    <ol class="barlist">${top.map((one) => candidate(one, most))}</ol>`;
}

/** @param {Candidate} one @param {number} most */
export function candidate(one, most) {
  const open = () => batch(() => {
    chosenToken.value = one.id;
    if (step.peek()?.dims.at(-1) === "V" && room.peek() === "walk") cell.value = { row: token.peek(), col: one.id };
  });
  return html`<li aria-current=${() => String(chosenToken.value === one.id)} @click=${open}
    tabindex="0" @keydown=${(/** @type {KeyboardEvent} */ event) => event.key === "Enter" && open()}>
    <bdi>${visible(one.text)}</bdi><small>${one.id}</small>
    <span class="track"><i css=${`width:${(one.probability / most) * 100}%`}></i></span>
    <span class="number">${percent(one.probability)}</span><span class="number soft">${short(one.logit)}</span></li>`;
}
