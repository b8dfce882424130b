// RoPE: each pair of components as a ray that turns with the position, before (thin) and after.

import { computed, effect, signal } from "../signals.js";
import { html, svg } from "../html.js";
import { get } from "../data/api.js";
import { headOf, run, token, tokenBy } from "../state.js";
import { short, visible } from "../data/numbers.js";
import { stillness } from "../theme.js";

/**
 * @typedef {{pair: number, angle: number, before: [number, number], after: [number, number], wavelength: number}} Pair
 */

/** @param {import("../state.js").Step} one */
export function rays(one) {
  const of = one.dims[0] === "Hkv" ? "k" : "q";
  const found = signal(/** @type {{pairs: Pair[], pairing: string} | null} */ (null));
  const said = signal("");
  const chosen = signal(0);
  const turned = signal(1); // share of the turn, 0 before and 1 after
  effect(() => {
    const [id, at] = [run.value?.run, token.value];
    const control = new AbortController();
    const path = `/api/runs/${encodeURIComponent(id ?? "")}/rope?layer=${one.layer ?? 0}&head=${headOf(one)}&of=${of}&token=${at}`;
    get(path, control.signal).then((answer) => (found.value = answer), (error) => {
      if (error.name !== "AbortError") said.value = error.message;
    });
    return () => control.abort();
  });
  effect(() => {
    if (found.value) return play(turned);
  });
  return html`<div class="rope"><div class="dial">${() => (found.value ? dial(found.value.pairs, chosen.value, turned) : said.value)}
    ${controls(turned, found)}</div>
    <div class="wheels" role="listbox" aria-label="pairs, fast to slow">${() => found.value?.pairs.map((pair) =>
      wheel(pair, chosen, turned)) ?? ""}</div></div>`;
}

/** Let the rays turn once. @param {import("../signals.js").Signal<number>} turned */
function play(turned) {
  if (stillness.matches) {
    turned.value = 1;
    return;
  }
  const start = performance.now();
  let frame = requestAnimationFrame(function step(now) {
    const share = Math.min((now - start) / 700, 1);
    turned.value = 1 - (1 - share) ** 3;
    if (share < 1) frame = requestAnimationFrame(step);
  });
  return () => cancelAnimationFrame(frame);
}

/**
 * @param {import("../signals.js").Signal<number>} turned
 * @param {import("../signals.js").Signal<{pairs: Pair[], pairing: string} | null>} found
 */
function controls(turned, found) {
  const most = computed(() => (run.value?.ids.length ?? 1) - 1);
  return html`<div class="controls">
    <label>position <input type="range" min="0" max=${most} .value=${() => String(token.value)}
      @input=${(/** @type {any} */ event) => (token.value = Number(event.target.value))}></label>
    <span>${() => token.value} ${() => visible(run.value?.tokens[token.value] ?? "")}</span>
    <button @click=${() => play(turned)}>turn again</button>
    <button title="next position" aria-label="next position" @click=${() => tokenBy(1)}>+1</button>
    <p class="note">${() => (found.value ? `Pairs are ${found.value.pairing === "half"
      ? "component i with component i + D/2 (halves)" : "neighbours, 2i with 2i + 1"}.` : "")}</p></div>`;
}

/** @param {Pair} pair @param {number} share */
function between(pair, share) {
  const angle = pair.angle * share;
  const [x, y] = pair.before;
  return [x * Math.cos(angle) - y * Math.sin(angle), x * Math.sin(angle) + y * Math.cos(angle)];
}

/** @param {Pair} pair */
function reach(pair) {
  return Math.max(Math.hypot(...pair.before), Math.hypot(...pair.after), 1e-9);
}

/**
 * @param {Pair[]} pairs
 * @param {number} index
 * @param {import("../signals.js").Signal<number>} turned
 */
function dial(pairs, index, turned) {
  const pair = pairs[Math.min(index, pairs.length - 1)];
  const scale = 92 / reach(pair);
  const point = (/** @type {number[]} */ at) => [110 + at[0] * scale, 110 - at[1] * scale];
  const before = point(pair.before);
  const now = () => point(turned.value === 1 ? pair.after : between(pair, turned.value));
  return html`<svg viewBox="0 0 220 220" role="img" aria-label=${`pair ${pair.pair} turns by ${short(pair.angle)} radians`}>
    <circle cx="110" cy="110" r="92" class="ring"></circle>
    <path d="M18 110H202M110 18V202" class="axis"></path>
    <path class="turn" d=${() => turnArc(pair, turned.value)}></path>
    <line x1="110" y1="110" x2=${before[0]} y2=${before[1]} class="before"></line>
    <circle cx=${before[0]} cy=${before[1]} r="4" class="before"></circle>
    <line x1="110" y1="110" x2=${() => now()[0]} y2=${() => now()[1]} class="after"></line>
    <circle cx=${() => now()[0]} cy=${() => now()[1]} r="5" class="after"></circle></svg>
    <dl><dt>pair</dt><dd>${pair.pair}</dd><dt>turn</dt><dd>${short(pair.angle)} rad</dd>
    <dt>full turn in</dt><dd>${short(pair.wavelength)} tokens</dd>
    <dt>before</dt><dd>${pair.before.map(short).join(", ")}</dd>
    <dt>after</dt><dd>${pair.after.map(short).join(", ")}</dd></dl>`;
}

/** @param {Pair} pair @param {number} share */
function turnArc(pair, share) {
  const start = Math.atan2(pair.before[1], pair.before[0]);
  const sweep = Math.sign(pair.angle) * Math.min(Math.abs(pair.angle * share), Math.PI * 2 - 0.01);
  const points = Array.from({ length: 49 }, (_, i) => start + (sweep * i) / 48);
  return `M${points.map((angle) => `${(110 + 30 * Math.cos(angle)).toFixed(1)} ${(110 - 30 * Math.sin(angle)).toFixed(1)}`).join("L")}`;
}

/**
 * @param {Pair} pair
 * @param {import("../signals.js").Signal<number>} chosen
 * @param {import("../signals.js").Signal<number>} turned
 */
function wheel(pair, chosen, turned) {
  const scale = 21 / reach(pair);
  const point = (/** @type {number[]} */ at) => [26 + at[0] * scale, 26 - at[1] * scale];
  const [bx, by] = point(pair.before);
  const now = () => point(turned.value === 1 ? pair.after : between(pair, turned.value));
  return html`<button role="option" aria-selected=${() => String(chosen.value === pair.pair)}
    aria-label=${`pair ${pair.pair}`} title=${`a full turn in ${short(pair.wavelength)} tokens`}
    @click=${() => (chosen.value = pair.pair)}><svg width="52" height="52" aria-hidden="true">
    ${[svg`<circle cx="26" cy="26" r="21" class="ring"></circle>`,
      svg`<line x1="26" y1="26" x2=${bx} y2=${by} class="before"></line>`,
      svg`<line x1="26" y1="26" x2=${() => now()[0]} y2=${() => now()[1]} class="after"></line>`]}</svg>
    <small>${pair.pair}</small></button>`;
}
