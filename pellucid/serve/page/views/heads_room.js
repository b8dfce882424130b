// All heads of a layer: thumbnails of their patterns and numbers that tell them apart, sortable.

import { batch, effect, signal } from "../signals.js";
import { html } from "../html.js";
import { get } from "../data/api.js";
import { goTo, head, layer, report, run } from "../state.js";
import { format } from "../address.js";
import { tensor } from "../data/tensors.js";
import { Scale, rangeOf } from "../data/scale.js";
import { short } from "../data/numbers.js";
import { theme } from "../theme.js";
import { layerPicker } from "./ledger.js";

/**
 * @typedef {{head: number, entropy: number, previous: number, first: number,
 *   induction: number | null, output_norm: number}} Head
 */
const COLUMNS = /** @type {const} */ ([
  ["head", "head"], ["entropy", "entropy, nats"], ["previous", "on the token before"],
  ["first", "on the first token"], ["induction", "induction"], ["output_norm", "norm of its output"]]);
const SIDE = 96;

export function headsRoom() {
  const found = signal(/** @type {Head[]} */ ([]));
  const by = signal(/** @type {keyof Head} */ ("head"));
  effect(() => {
    const [id, at] = [run.value?.run, layer.value];
    if (!id) return;
    const control = new AbortController();
    get(`/api/runs/${encodeURIComponent(id)}/heads?layer=${at}`, control.signal)
      .then((answer) => (found.value = answer.heads), report);
    return () => control.abort();
  });
  const order = () => [...found.value].sort((a, b) => (by.value === "head" ? a.head - b.head
    : (b[by.value] ?? -1) - (a[by.value] ?? -1)));
  return html`<section class="room heads" aria-label="heads"><header><h2>Heads</h2>${layerPicker()}
    <label class="choice">in order of <select aria-label="order of the heads"
      @change=${(/** @type {any} */ event) => (by.value = event.target.value)}>
      ${COLUMNS.map(([name, text]) => html`<option value=${name}>${text}</option>`)}</select></label></header>
    <ol class="headgrid">${() => order().map((one) => card(one, run.peek()?.run ?? "", layer.peek()))}</ol></section>`;
}

/** @param {Head} one @param {string} id @param {number} at */
function card(one, id, at) {
  const canvas = html`<canvas width="1" height="1" aria-hidden="true"></canvas>`;
  const name = `layers.${at}.attn.pattern`;
  const size = Math.min(run.peek()?.ids.length ?? 1, SIDE);
  const how = size < SIDE ? {} : { reduce: "max", to: /** @type {[number, number]} */ ([size, size]) };
  tensor(id, format(name, [one.head]), how).then(({ data, shape }) => paint(canvas, data, shape.at(-1) ?? size), () => {});
  const open = () => batch(() => {
    head.value = one.head;
    goTo(name);
  });
  return html`<li><button @click=${open} aria-label=${`head ${one.head}: open its pattern`}>${canvas}</button>
    <h3>head ${one.head}</h3><dl>${COLUMNS.slice(1).map(([key, text]) => {
      const value = one[key];
      const share = value !== null && ["previous", "first", "induction"].includes(key) ? value : 0;
      return html`<div title=${text}><dt>${text}</dt><dd>${value === null ? "—" : short(value)}
        <i css=${`width:${share * 100}%`}></i></dd></div>`;
    })}</dl></li>`;
}

/** @param {HTMLCanvasElement} canvas @param {Float32Array | Float64Array} data @param {number} width */
function paint(canvas, data, width) {
  const { limit, knee } = rangeOf(data, "float32");
  const scale = new Scale({ palette: "share", dark: theme.peek() === "dark", bend: "sym", limit, knee, clearZero: true });
  canvas.width = width;
  canvas.height = data.length / width;
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  const image = context.createImageData(canvas.width, canvas.height);
  scale.paint(data, new Uint32Array(image.data.buffer), width);
  context.putImageData(image, 0, 0);
}
