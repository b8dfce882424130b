// One frame of a heat map: hatching, overview, exact tiles, lines, labels, numbers, the cursor.

import { TILE } from "../data/plane.js";
import { fitting } from "../data/numbers.js";
import { ink } from "../theme.js";

export const FONT = "11px ui-monospace, 'SF Mono', Menlo, Consolas, 'DejaVu Sans Mono', monospace";
export const FLAT = 46; // pixels of a column from which on its label lies flat
/** @typedef {import("./heatmap.js").Heatmap} Heatmap */

/** @param {Heatmap} map */
export function paintHeatmap(map) {
  const { context, gutter, width, height, plane, view } = map;
  const right = Math.min(gutter.left + (plane.cols - view.x) * view.sx, width - gutter.right);
  const bottom = Math.min(gutter.top + (plane.rows - view.y) * view.sy, height - gutter.bottom);
  context.setTransform(devicePixelRatio, 0, 0, devicePixelRatio, 0, 0);
  context.clearRect(0, 0, width, height);
  context.save();
  context.beginPath();
  context.rect(gutter.left, gutter.top, right - gutter.left, bottom - gutter.top);
  context.clip();
  // Hatched is masked; what has not come yet is plain, and says so.
  context.fillStyle = plane.range.peek() && !map.options.plain ? hatch(context) : ink("--wash");
  context.fillRect(gutter.left, gutter.top, right - gutter.left, bottom - gutter.top);
  if (!plane.range.peek()) paintWaiting(map, right, bottom);
  context.imageSmoothingEnabled = false;
  paintOverview(map);
  paintTiles(map);
  if (Math.min(view.sx, view.sy) >= 9) paintLines(map, right, bottom);
  paintTexts(map);
  paintCursors(map);
  context.restore();
  paintFrame(map, right, bottom);
  paintLabels(map, right, bottom);
}

/** @param {Heatmap} map @param {number} right @param {number} bottom */
function paintWaiting({ context, gutter, plane }, right, bottom) {
  context.fillStyle = ink("--faint");
  context.font = FONT;
  context.textAlign = "center";
  context.fillText(plane.error.peek() ? "" : "computing…", (gutter.left + right) / 2, (gutter.top + bottom) / 2);
}

/** @type {Map<string, CanvasPattern>} */
const patterns = new Map();

/** Diagonal lines: there is no number here. @param {CanvasRenderingContext2D} context */
function hatch(context) {
  const key = `${ink("--hatch")} ${devicePixelRatio}`;
  const known = patterns.get(key);
  if (known) return known;
  const tile = document.createElement("canvas");
  tile.width = tile.height = 6;
  const drawing = /** @type {CanvasRenderingContext2D} */ (tile.getContext("2d"));
  drawing.strokeStyle = ink("--hatch");
  drawing.lineWidth = 1;
  for (const x of [-3, 3, 9]) {
    drawing.moveTo(x - 3.5, 6.5);
    drawing.lineTo(x + 3.5, -0.5);
  }
  drawing.stroke();
  const made = /** @type {CanvasPattern} */ (context.createPattern(tile, "repeat"));
  patterns.set(key, made);
  return made;
}

/** @param {Heatmap} map */
function paintOverview(map) {
  const { plane, view, gutter, context } = map;
  if (!plane.overview) return;
  const { data, rows, cols } = plane.overview;
  const canvas = map.paintedTile(-1, data, cols, rows);
  context.drawImage(canvas, gutter.left - view.x * view.sx, gutter.top - view.y * view.sy,
    plane.cols * view.sx, plane.rows * view.sy);
}

/** @param {Heatmap} map */
function paintTiles(map) {
  const { plane, view, gutter, context } = map;
  const { width, height } = map.room;
  // Cells smaller than a pixel are left to the overview, which keeps the largest of them.
  if (plane.overview && Math.min(view.sx, view.sy) * devicePixelRatio < 1) return;
  const lastRow = Math.min(plane.tileRows - 1, Math.floor((view.y + height / view.sy) / TILE));
  const lastCol = Math.min(plane.tileCols - 1, Math.floor((view.x + width / view.sx) / TILE));
  for (let i = Math.floor(view.y / TILE); i <= lastRow; i++) {
    for (let j = Math.floor(view.x / TILE); j <= lastCol; j++) {
      const data = plane.tile(i, j);
      if (!data) continue;
      const [tall, wide] = plane.extent(i, j);
      const canvas = map.paintedTile(i * plane.tileCols + j, data, wide, tall);
      const x = gutter.left + (j * TILE - view.x) * view.sx;
      const y = gutter.top + (i * TILE - view.y) * view.sy;
      if (plane.overview) blank(context, x, y, wide * view.sx, tall * view.sy);
      context.drawImage(canvas, x, y, wide * view.sx, tall * view.sy);
    }
  }
}

/**
 * Take the overview away where exact cells come.
 * @param {CanvasRenderingContext2D} context
 * @param {number} x
 * @param {number} y
 * @param {number} width
 * @param {number} height
 */
function blank(context, x, y, width, height) {
  context.clearRect(x, y, width, height);
  context.fillStyle = hatch(context);
  context.fillRect(x, y, width, height);
}

/** First and last cell in view. @param {Heatmap} map */
function seen(map) {
  const { plane, view } = map;
  const { width, height } = map.room;
  return {
    top: Math.max(0, Math.floor(view.y)), left: Math.max(0, Math.floor(view.x)),
    bottom: Math.min(plane.rows, Math.ceil(view.y + height / view.sy)),
    right: Math.min(plane.cols, Math.ceil(view.x + width / view.sx)),
  };
}

/** @param {Heatmap} map @param {number} right @param {number} bottom */
function paintLines(map, right, bottom) {
  const { context, view, gutter } = map;
  const box = seen(map);
  context.beginPath();
  for (let col = box.left; col <= box.right; col++) {
    const x = Math.round(gutter.left + (col - view.x) * view.sx) + 0.5;
    context.moveTo(x, gutter.top);
    context.lineTo(x, bottom);
  }
  for (let row = box.top; row <= box.bottom; row++) {
    const y = Math.round(gutter.top + (row - view.y) * view.sy) + 0.5;
    context.moveTo(gutter.left, y);
    context.lineTo(right, y);
  }
  context.strokeStyle = ink("--paper");
  context.lineWidth = 1;
  context.stroke();
}

/** What stands in cells: numbers, or what the picture says. @param {Heatmap} map */
function paintTexts(map) {
  const { context, view, plane, scale, options } = map;
  if (view.sx < 34 || view.sy < 14 || !scale) return;
  const box = seen(map);
  context.font = options.text ? FONT.replace("11px", "11.5px") : FONT;
  context.textAlign = "center";
  context.textBaseline = "middle";
  for (let y = box.top; y < box.bottom; y++) {
    for (let col = box.left; col < box.right; col++) {
      const row = map.flip(y);
      const value = plane.value(row, col);
      if (value === undefined || value <= scale.masked) continue;
      const [cx, cy] = map.pointOf(row, col);
      context.fillStyle = scale.wantsDarkText(value) ? "#15171b" : "#fbfaf8";
      const text = options.text ? clipped(context, options.text(row, col), view.sx - 6)
        : fitting(value, (tried) => context.measureText(tried).width <= view.sx - 5);
      context.fillText(text, cx, cy + 0.5);
    }
  }
}

/** @param {CanvasRenderingContext2D} context @param {string} text @param {number} width */
function clipped(context, text, width) {
  if (context.measureText(text).width <= width) return text;
  let kept = text;
  while (kept.length > 1 && context.measureText(`${kept}…`).width > width) kept = kept.slice(0, -1);
  return `${kept}…`;
}

/** @param {Heatmap} map */
function paintCursors(map) {
  const { context, view, gutter, plane, options } = map;
  const marked = options.markedRow?.() ?? -1;
  if (marked >= 0 && view.sy >= 3 && view.sy < plane.rows * view.sy) {
    const y = gutter.top + (map.flip(marked) - view.y) * view.sy;
    context.strokeStyle = ink("--accent");
    context.globalAlpha = 0.55;
    context.lineWidth = 1;
    context.strokeRect(gutter.left + 0.5, y + 0.5, plane.cols * view.sx - 1, view.sy - 1);
    context.globalAlpha = 1;
  }
  for (const [at, strong] of /** @type {const} */ ([[map.hovered, false], [options.cursor(), true]])) {
    if (!at) continue;
    const [cx, cy] = map.pointOf(at.row, at.col);
    const [w, h] = [Math.max(view.sx, 5), Math.max(view.sy, 5)];
    context.lineWidth = strong ? 3.5 : 1.5;
    context.strokeStyle = ink("--paper");
    context.strokeRect(cx - w / 2 - 0.5, cy - h / 2 - 0.5, w + 1, h + 1);
    context.lineWidth = strong ? 2 : 1;
    context.strokeStyle = ink(strong ? "--accent" : "--ink");
    context.strokeRect(cx - w / 2 - 0.5, cy - h / 2 - 0.5, w + 1, h + 1);
  }
}

/** @param {Heatmap} map @param {number} right @param {number} bottom */
function paintFrame(map, right, bottom) {
  const { context, gutter, view, plane } = map;
  context.strokeStyle = ink("--line");
  context.lineWidth = 1;
  context.strokeRect(gutter.left - 0.5, gutter.top - 0.5, right - gutter.left + 1, bottom - gutter.top + 1);
  if (!map.zoomed) return;
  const { width, height } = map.room;
  context.fillStyle = ink("--accent");
  const across = width / view.sx / plane.cols;
  const down = height / view.sy / plane.rows;
  if (across < 1) context.fillRect(gutter.left + (view.x / plane.cols) * width, bottom + 3, Math.max(8, across * width), 3);
  if (down < 1) context.fillRect(right + 3, gutter.top + (view.y / plane.rows) * height, 3, Math.max(8, down * height));
}

/** @param {Heatmap} map @param {number} right @param {number} bottom */
function paintLabels(map, right, bottom) {
  const { context, view, gutter, options } = map;
  const box = seen(map);
  const chosen = map.hovered ?? options.cursor();
  const marked = options.markedRow?.() ?? -1;
  context.font = FONT;
  context.textBaseline = "middle";
  if (options.rowLabel) {
    context.textAlign = "right";
    const step = Math.max(1, Math.ceil(13 / view.sy));
    for (let y = Math.ceil(box.top / step) * step; y < box.bottom; y += step) {
      const row = map.flip(y);
      const cy = map.pointOf(row, 0)[1];
      if (cy < gutter.top - 2 || cy > bottom + 2) continue;
      context.fillStyle = ink(row === chosen?.row || row === marked ? "--accent" : "--soft");
      context.fillText(clipped(context, options.rowLabel(row), gutter.left - 8), gutter.left - 6, cy);
    }
  }
  if (options.colLabel && view.sx >= 5.5) paintColumnLabels(map, box, right, chosen);
  else paintColumnTicks(map, box);
  if (options.rowLabel && view.sy < 13 && chosen) namePlace(map, chosen);
}

/**
 * Labels of columns, upright where they have no room to lie.
 * @param {Heatmap} map
 * @param {{left: number, right: number}} box
 * @param {number} right
 * @param {import("../state.js").Cell | null} chosen
 */
function paintColumnLabels(map, box, right, chosen) {
  const { context, view, gutter, options } = map;
  const label = /** @type {(col: number) => string} */ (options.colLabel);
  const flat = view.sx >= FLAT;
  const step = Math.max(1, Math.ceil(13 / view.sx));
  for (let col = Math.ceil(box.left / step) * step; col < box.right; col += step) {
    const x = gutter.left + (col + 0.5 - view.x) * view.sx;
    if (x < gutter.left - 2 || x > right + 2) continue;
    context.fillStyle = ink(col === chosen?.col ? "--accent" : "--soft");
    const text = label(col);
    context.save();
    context.translate(x, gutter.top - 6);
    context.textAlign = flat ? "center" : "left";
    if (!flat) context.rotate(-Math.PI / 2);
    context.fillText(clipped(context, text, flat ? view.sx - 4 : gutter.top - 8), 0, flat ? -3 : 0);
    context.restore();
  }
}

/** @param {Heatmap} map @param {{left: number, right: number}} box */
function paintColumnTicks(map, box) {
  const { context, view, gutter } = map;
  const rough = Math.max(1, 64 / view.sx);
  const power = 2 ** Math.ceil(Math.log2(rough));
  context.textAlign = "center";
  context.fillStyle = ink("--faint");
  for (let col = Math.ceil(box.left / power) * power; col < box.right; col += power) {
    const x = gutter.left + (col + 0.5 - view.x) * view.sx;
    context.fillText(String(col), Math.max(x, gutter.left + 4), gutter.top - 9);
    context.fillRect(Math.round(x), gutter.top - 4, 1, 3);
  }
}

/** The label of the chosen row where not all rows have one. @param {Heatmap} map @param {import("../state.js").Cell} at */
function namePlace(map, at) {
  const { context, gutter, options, view } = map;
  const y = gutter.top + (map.flip(at.row) + 0.5 - view.y) * view.sy;
  const text = clipped(context, /** @type {any} */ (options.rowLabel)(at.row), gutter.left - 10);
  context.fillStyle = ink("--paper");
  context.fillRect(0, y - 8, gutter.left - 2, 16);
  context.fillStyle = ink("--accent");
  context.textAlign = "right";
  context.fillText(text, gutter.left - 6, y);
}
