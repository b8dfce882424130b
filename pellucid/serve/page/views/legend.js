// The bar that says which colour is which number, and how the scale is bent.

import { effect } from "../signals.js";
import { html } from "../html.js";
import { bend } from "../state.js";
import { BENDS } from "../data/scale.js";
import { short } from "../data/numbers.js";

/**
 * @param {import("../signals.js").Signal<{scale: import("../data/scale.js").Scale, note: string} | null>} legend
 * @param {{masked?: boolean, choice?: boolean}} [how]
 */
export function legendBar(legend, how = {}) {
  const canvas = html`<canvas width="256" height="1" class="ramp" aria-hidden="true"></canvas>`;
  const ticks = html`<span class="ticks"></span>`;
  effect(() => {
    const scale = legend.value?.scale;
    if (!scale) return;
    paintRamp(canvas, scale);
    const marks = scale.signed ? [-1, -0.5, 0, 0.5, 1] : [0, 0.25, 0.5, 0.75, 1];
    ticks.replaceChildren(...marks.map((at) => html`<span>${short(Math.sign(at) * scale.valueAt(Math.abs(at)))}</span>`));
  });
  return html`<div class="legend"><span class="scale">${canvas}${ticks}</span>
    ${how.masked ? html`<span class="key"><i class="hatched"></i>masked, −∞</span>` : ""}
    <span class="note" role="status">${() => legend.value?.note ?? ""}</span>
    ${how.choice === false ? "" : bendChoice(legend)}</div>`;
}

/** @param {HTMLCanvasElement} canvas @param {import("../data/scale.js").Scale} scale */
function paintRamp(canvas, scale) {
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  const image = context.createImageData(256, 1);
  new Uint32Array(image.data.buffer).set(scale.colours);
  context.putImageData(image, 0, 0);
}

/** @param {import("../signals.js").Signal<{scale: import("../data/scale.js").Scale, note: string} | null>} legend */
function bendChoice(legend) {
  return html`<label class="choice">scale <select aria-label="scale of the colours"
    .value=${() => legend.value?.scale.bend ?? "sym"}
    @change=${(/** @type {any} */ event) => (bend.value = event.target.value)}>
    ${BENDS.map(([name, text]) => html`<option value=${name}>${text}</option>`)}</select></label>`;
}

/** The next bend of the scale. @param {import("../data/scale.js").Bend} now */
export function nextBend(now) {
  const names = BENDS.map(([name]) => name);
  return names[(names.indexOf(now) + 1) % names.length];
}
