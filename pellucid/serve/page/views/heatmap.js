// A heat map of any size on a canvas: an overview at once, exact cells where one looks, keys,
// a live sentence for screen readers. Values are never interpolated.

import { effect, onEnd, signal } from "../signals.js";
import { html } from "../html.js";
import { Scale } from "../data/scale.js";
import { theme } from "../theme.js";
import { Hand } from "./hand.js";
import { FLAT, FONT, paintHeatmap } from "./heatmap_paint.js";

/**
 * @typedef {object} Options
 * @property {import("../data/plane.js").Plane} plane
 * @property {import("../data/scale.js").Palette} palette
 * @property {string} label what the picture is, for a screen reader
 * @property {(row: number) => string} [rowLabel]
 * @property {(col: number) => string} [colLabel]
 * @property {(row: number, col: number, value: number | undefined) => string} say
 * @property {() => import("../state.js").Cell | null} cursor
 * @property {(row: number, col: number) => void} pick
 * @property {() => number} [markedRow] row to point out
 * @property {() => import("../data/scale.js").Bend} bend
 * @property {boolean} [square] whether cells keep their shape
 * @property {boolean} [upward] whether row 0 is at the bottom
 * @property {(row: number, col: number) => string} [text] what a cell says where it has room
 * @property {number} [most] pixels of a cell at most when all is shown
 * @property {boolean} [plain] whether cells without a number are yet to come, not masked
 * @property {boolean} [clearZero] whether an exact 0 is masked
 * @property {number} [limit] of the scale; otherwise the largest value
 * @property {import("../data/plane.js").Plane} [alike] another plane that has the same scale
 * @property {number} [widest] pixels of a column at most when all is shown
 * @property {(legend: {scale: Scale, note: string}) => void} [onLegend]
 */

export class Heatmap {
  /** @param {Options} options */
  constructor(options) {
    this.options = options;
    this.plane = options.plane;
    this.view = { x: 0, y: 0, sx: 1, sy: 1 }; // first column and row, pixels a cell
    this.gutter = { left: 8, top: 8, right: 8, bottom: 8 };
    this.width = this.height = 0;
    this.touched = false; // whether someone moved it
    /** @type {import("../state.js").Cell | null} */
    this.hovered = null;
    /** @type {Map<number, {canvas: HTMLCanvasElement, key: string, data: any}>} */
    this.painted = new Map();
    this.frame = 0;
    this.redraws = signal(0);
    /** @type {Heatmap[]} */
    this.mates = []; // pictures of the same axes, which show the same part
    /** @type {HTMLCanvasElement} */
    this.canvas = html`<canvas class="grid" tabindex="0" role="grid" aria-label=${options.label}
      aria-rowcount=${this.plane.rows} aria-colcount=${this.plane.cols}></canvas>`;
    /** @type {HTMLElement} */
    this.tip = html`<div class="tip" hidden></div>`;
    /** @type {HTMLElement} */
    this.spoken = html`<div class="spoken" aria-live="polite"></div>`;
    this.element = html`<div class="heatmap">${this.canvas}${this.tip}${this.spoken}</div>`;
    this.context = /** @type {CanvasRenderingContext2D} */ (this.canvas.getContext("2d"));
    /** @type {any} */ (this.canvas).heatmap = this; // for the console, and for tests that read pixels
    this.hand = new Hand(this);
    this.watch();
  }

  watch() {
    const observer = new ResizeObserver(() => this.resize());
    observer.observe(this.element);
    onEnd(() => observer.disconnect());
    onEnd(() => cancelAnimationFrame(this.frame));
    effect(() => {
      this.plane.version.value;
      this.plane.error.value;
      this.options.cursor();
      this.options.markedRow?.();
      this.redraws.value;
      this.scale = this.makeScale();
      this.announceLegend();
      this.draw();
    });
    effect(() => {
      const at = this.options.cursor();
      this.plane.version.value;
      if (at) this.spoken.textContent = this.options.say(at.row, at.col, this.plane.value(at.row, at.col));
    });
  }

  makeScale() {
    const range = wider(this.plane.range.value, this.options.alike?.range.value ?? null);
    const { palette, limit, clearZero } = this.options;
    return new Scale({
      palette, clearZero,
      dark: theme.value === "dark", bend: this.options.bend(), limit: limit ?? range?.limit ?? 1,
      knee: range?.knee ?? 1, least: range?.least, dtype: this.plane.dtype,
    });
  }

  announceLegend() {
    if (!this.scale || !this.options.onLegend) return;
    const cell = Math.min(this.view.sx, this.view.sy) * devicePixelRatio;
    const reduced = this.plane.reduced && cell < 1;
    this.options.onLegend({
      scale: this.scale,
      note: this.plane.error.value || (reduced
        ? `Reduced: each point is the largest of ${this.plane.reduced.replace("per cell", "").trim().replace("x", " × ")} cells. Zoom in for exact ones.`
        : ""),
    });
  }

  /** Fit the canvas to its box. */
  resize() {
    if (!this.options.square && !this.plane.overview) { // no taller than its rows ever are
      this.element.style.maxHeight = `${this.plane.rows * (this.options.most ?? 64) + 110}px`;
    }
    const box = this.element.getBoundingClientRect();
    if (!box.width || !box.height) return;
    this.width = Math.round(box.width);
    this.height = Math.round(box.height);
    this.canvas.width = Math.round(this.width * devicePixelRatio);
    this.canvas.height = Math.round(this.height * devicePixelRatio);
    if (this.touched) this.clampView();
    else this.fit();
    this.announceLegend();
    this.draw();
  }

  measureGutters() {
    const { rowLabel, colLabel } = this.options;
    this.context.font = FONT;
    const widest = (/** @type {(i: number) => string} */ label, /** @type {number} */ count, /** @type {number} */ most) => {
      let width = 0;
      for (let i = 0; i < Math.min(count, 300); i++) {
        width = Math.max(width, this.context.measureText(label(i)).width);
      }
      return Math.min(Math.ceil(width) + 10, most);
    };
    this.gutter.left = rowLabel ? widest(rowLabel, this.plane.rows, Math.min(96, this.width * 0.22)) + 4 : 8;
    this.gutter.top = colLabel ? widest(colLabel, this.plane.cols, 76) : 20;
  }

  get room() {
    return {
      width: Math.max(1, this.width - this.gutter.left - this.gutter.right),
      height: Math.max(1, this.height - this.gutter.top - this.gutter.bottom),
    };
  }

  /** Show all of it. */
  fit() {
    this.measureGutters();
    this.fitInto();
    if (!this.options.colLabel || this.view.sx < FLAT) return;
    this.gutter.top = 26; // labels lie flat and need one line
    this.fitInto();
  }

  fitInto() {
    const { width, height } = this.room;
    const most = this.options.most ?? 64;
    let sx = width / this.plane.cols;
    let sy = Math.min(height / this.plane.rows, most);
    if (this.options.square) sx = sy = Math.min(sx, sy);
    else sx = Math.min(sx, this.options.widest ?? most);
    this.least = { sx, sy };
    this.view = { x: 0, y: 0, sx, sy };
    this.touched = false;
  }

  clampView() {
    const { width, height } = this.room;
    const { view, plane } = this;
    const most = this.options.text ? 220 : 120;
    const least = this.least ?? { sx: 0.01, sy: 0.01 };
    view.sx = Math.min(Math.max(view.sx, least.sx), Math.max(most, least.sx));
    view.sy = Math.min(Math.max(view.sy, least.sy), Math.max(most, least.sy));
    view.x = Math.min(Math.max(view.x, 0), Math.max(0, plane.cols - width / view.sx));
    view.y = Math.min(Math.max(view.y, 0), Math.max(0, plane.rows - height / view.sy));
  }

  /**
   * Zoom about a point of the canvas.
   * @param {number} factor
   * @param {number} px
   * @param {number} py
   */
  zoom(factor, px, py) {
    const { view, gutter } = this;
    const [cx, cy] = [view.x + (px - gutter.left) / view.sx, view.y + (py - gutter.top) / view.sy];
    view.sx *= factor;
    view.sy *= this.options.square || view.sy * factor < 44 ? factor : 1;
    this.clampView();
    view.x = cx - (px - gutter.left) / view.sx;
    view.y = cy - (py - gutter.top) / view.sy;
    this.moved();
  }

  /** @param {number} dx pixels @param {number} dy */
  pan(dx, dy) {
    this.view.x -= dx / this.view.sx;
    this.view.y -= dy / this.view.sy;
    this.moved();
  }

  moved() {
    this.follow();
    for (const mate of this.mates) {
      const { x, y, sx, sy } = this.view; // of a mate of the same size on the page
      Object.assign(mate.view, { x, y, sx, sy });
      mate.follow();
    }
  }

  follow() {
    this.canvas.style.touchAction = this.zoomed ? "none" : "pan-y";
    this.touched = true;
    this.clampView();
    this.announceLegend();
    this.draw();
  }

  get zoomed() {
    return this.least !== undefined && (this.view.sx > this.least.sx * 1.01 || this.view.sy > this.least.sy * 1.01);
  }

  /** Bring a cell into view. @param {number} row @param {number} col */
  reveal(row, col) {
    const { width, height } = this.room;
    const { view } = this;
    const y = this.flip(row);
    view.x = Math.min(Math.max(view.x, col + 1 - width / view.sx), col);
    view.y = Math.min(Math.max(view.y, y + 1 - height / view.sy), y);
    this.clampView();
  }

  /** The row drawn at a height, and back. @param {number} row */
  flip(row) {
    return this.options.upward ? this.plane.rows - 1 - row : row;
  }

  /**
   * The cell under a point of the canvas.
   * @param {number} px
   * @param {number} py
   */
  cellAt(px, py) {
    const { view, gutter, plane } = this;
    const col = Math.floor(view.x + (px - gutter.left) / view.sx);
    const row = Math.floor(view.y + (py - gutter.top) / view.sy);
    if (px < gutter.left || py < gutter.top || col < 0 || row < 0 || col >= plane.cols || row >= plane.rows) return null;
    return { row: this.flip(row), col };
  }

  /** The middle of a cell on the canvas. @param {number} row @param {number} col */
  pointOf(row, col) {
    const { view, gutter } = this;
    return [gutter.left + (col + 0.5 - view.x) * view.sx, gutter.top + (this.flip(row) + 0.5 - view.y) * view.sy];
  }

  /** @param {import("../state.js").Cell | null} at @param {number} px @param {number} py */
  hover(at, px, py) {
    this.hovered = at;
    this.tip.hidden = !at;
    if (at) {
      this.tip.textContent = this.options.say(at.row, at.col, this.plane.value(at.row, at.col));
      const left = Math.min(px + 14, this.width - this.tip.offsetWidth - 4);
      const top = py > this.height - 60 ? py - 34 : py + 16;
      this.tip.style.transform = `translate(${Math.max(4, left)}px, ${top}px)`;
    }
    this.draw();
  }

  draw() {
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = 0;
      if (this.width && this.scale) paintHeatmap(this);
    });
  }

  /**
   * A tile in colours.
   * @param {number} key
   * @param {any} data
   * @param {number} width
   * @param {number} height
   */
  paintedTile(key, data, width, height) {
    const scale = /** @type {Scale} */ (this.scale);
    const known = this.painted.get(key);
    if (known && known.key === scale.key && known.data === data) return known.canvas;
    const canvas = known?.canvas ?? document.createElement("canvas");
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
    const image = context.createImageData(width, height);
    scale.paint(data, new Uint32Array(image.data.buffer), width);
    if (this.options.upward) flipRows(image);
    context.putImageData(image, 0, 0);
    this.painted.set(key, { canvas, key: scale.key, data });
    if (this.painted.size > 400) this.painted.delete(/** @type {number} */ (this.painted.keys().next().value));
    return canvas;
  }
}

/**
 * The range of two planes together.
 * @param {import("../data/plane.js").Range | null} one
 * @param {import("../data/plane.js").Range | null} two
 */
function wider(one, two) {
  if (!one || !two) return one;
  return { ...one, limit: Math.max(one.limit, two.limit), knee: Math.max(one.knee, two.knee), least: Math.min(one.least, two.least) };
}

/** @param {ImageData} image */
function flipRows(image) {
  const rows = new Uint32Array(image.data.buffer);
  const { width, height } = image;
  for (let top = 0, bottom = height - 1; top < bottom; top++, bottom--) {
    const kept = rows.slice(top * width, (top + 1) * width);
    rows.copyWithin(top * width, bottom * width, (bottom + 1) * width);
    rows.set(kept, bottom * width);
  }
}
