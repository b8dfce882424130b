// A button that copies.

import { html } from "../html.js";

/** @param {() => string} text */
export function copyButton(text) {
  const button = html`<button class="copy" @click=${async () => {
    try {
      await navigator.clipboard.writeText(text());
      button.textContent = "copied";
    } catch {
      button.textContent = "not allowed here";
    }
    setTimeout(() => (button.textContent = "copy"), 1500);
  }}>copy</button>`;
  return button;
}
