// A button that copies.

import { html } from "../html.js";

/** @param {() => string} text @param {string} [label] */
export function copyButton(text, label = "copy") {
  const button = html`<button class="copy" @click=${async () => {
    try {
      await navigator.clipboard.writeText(text());
      button.textContent = "copied";
    } catch {
      button.textContent = "not allowed here";
    }
    setTimeout(() => (button.textContent = label), 1500);
  }}>${label}</button>`;
  return button;
}
