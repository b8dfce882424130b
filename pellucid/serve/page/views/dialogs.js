// Dialogs: the keys, finding a step, the server's key.

import { effect } from "../signals.js";
import { html } from "../html.js";
import { goTo, report, goToAddress, run, ROOMS } from "../state.js";
import { titleOf } from "./role.js";
import { keyNeeded } from "../data/api.js";

/** @type {() => [string, string][]} */
let listed = () => [];
/** What the list of keys shows. @param {() => [string, string][]} list */
export function listKeys(list) {
  listed = list;
}

/** @param {any} content @param {string} label */
function open(content, label) {
  document.querySelector("dialog[open]")?.remove();
  const dialog = html`<dialog aria-label=${label}>${content}</dialog>`;
  dialog.addEventListener("close", () => dialog.remove());
  dialog.addEventListener("click", (/** @type {Event} */ event) => event.target === dialog && dialog.close());
  document.body.append(dialog);
  dialog.showModal();
  return dialog;
}

export function openHelp() {
  const go = ROOMS.map(([, title]) => title).join(", ");
  open(html`<form method="dialog"><h2>Keys</h2><dl class="keys">${listed().map(([key, what]) => html`<div>
    <dt><kbd>${key.replace("Arrow", "").replace(/^Up$/, "↑").replace(/^Down$/, "↓").replace(/^Left$/, "←").replace(/^Right$/, "→")}</kbd></dt>
    <dd>${what}</dd></div>`)}</dl>
    <p class="note"><kbd>g</kbd> then <kbd>m w h l c g e</kbd> goes to ${go}. In a picture: wheel or pinch zooms, drag pans, a double click shows all.</p>
    <button class="primary" autofocus>Close</button></form>`, "keys");
}

export function openPalette() {
  const steps = run.peek()?.steps ?? [];
  const input = html`<input placeholder="a step or an address: layers.3.attn.scores[5,7,3]" aria-label="find a step" spellcheck="false">`;
  const list = html`<ol class="found"></ol>`;
  const dialog = open(html`<div class="palette">${input}${list}</div>`, "find a step");
  const pick = (/** @type {string} */ id) => {
    dialog.close();
    goTo(id);
  };
  const show = () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = steps.filter((one) => words.every((/** @type {string} */ word) => `${one.id} ${one.title}`.toLowerCase().includes(word))).slice(0, 12);
    list.replaceChildren(...found.map((one) => html`<li><button @click=${() => pick(one.id)}><span>${titleOf(one, true)}</span><code>${one.id}</code></button></li>`));
  };
  input.addEventListener("input", show);
  input.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
    if (event.key !== "Enter") return;
    event.preventDefault();
    if (!input.value.includes("[")) return list.querySelector("button")?.click();
    try {
      goToAddress(input.value);
      dialog.close();
    } catch (error) {
      dialog.close();
      report(error);
    }
  });
  show();
  input.focus();
}

export function askForKey() {
  effect(() => {
    if (!keyNeeded.value) return;
    const input = html`<input type="password" aria-label="key" autocomplete="off">`;
    const dialog = open(html`<form method="dialog"><h2>This server needs a key</h2><p>It was started with --api-key.</p>${input}
      <button class="primary">Enter</button></form>`, "key");
    dialog.addEventListener("close", () => {
      sessionStorage.setItem("key", input.value);
      location.reload();
    });
    input.focus();
  });
}
