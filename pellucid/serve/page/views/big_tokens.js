// The step from text to ids, large.

import { html } from "../html.js";
import { run, token } from "../state.js";
import { visible } from "../data/numbers.js";

const MOST = 600;

export function bigTokens() {
  const { ids = [], tokens = [], prompt = "" } = run.peek() ?? {};
  return html`<div class="bigtokens"><p class="note">${new TextEncoder().encode(prompt).length} bytes of text,
    ${ids.length} tokens${ids.length > MOST ? ` (the first ${MOST} are shown)` : ""}.</p>
    <ol>${ids.slice(0, MOST).map((id, i) => html`<li aria-current=${() => String(token.value === i)}
      @click=${() => (token.value = i)}><small>${i}</small><bdi>${visible(tokens[i] ?? "")}</bdi><b>${id}</b></li>`)}</ol></div>`;
}
