// The prompt as tokens: text with white space made visible, ids below; one of them is chosen.

import { effect } from "../signals.js";
import { html } from "../html.js";
import { run, token } from "../state.js";
import { visible } from "../data/numbers.js";

const SHOWN = 400; // chips around the chosen one; the rest is said in words

export function chips() {
  const list = html`<ol class="chips" role="listbox" aria-label="tokens of the prompt" tabindex="0"></ol>`;
  effect(() => {
    const { ids = [], tokens = [] } = run.value ?? {};
    const from = Math.max(0, Math.min(token.peek() - SHOWN / 2, ids.length - SHOWN));
    const shown = ids.slice(from, from + SHOWN);
    list.replaceChildren(
      ...(from ? [html`<li class="more">… ${from} before</li>`] : []),
      ...shown.map((id, i) => chip(from + i, id, tokens[from + i] ?? "")),
      ...(from + SHOWN < ids.length ? [html`<li class="more">… ${ids.length - from - SHOWN} more</li>`] : []));
  });
  effect(() => {
    const here = token.value;
    run.value;
    for (const one of list.querySelectorAll("[aria-selected=true]")) one.setAttribute("aria-selected", "false");
    const chosen = list.querySelector(`[data-at="${here}"]`);
    chosen?.setAttribute("aria-selected", "true");
    if (chosen) list.scrollTo({ left: chosen.offsetLeft - list.clientWidth / 2 });
  });
  return list;
}

/** @param {number} at @param {number} id @param {string} text */
function chip(at, id, text) {
  return html`<li role="option" aria-selected="false" data-at=${at} title=${`token ${at}, id ${id}`}
    @click=${() => (token.value = at)}><bdi>${visible(text)}</bdi><small>${id}</small></li>`;
}
