// What hands do to a heat map: point, click, drag, wheel, pinch, keys.

/** @typedef {import("./heatmap.js").Heatmap} Heatmap */

export class Hand {
  /** @param {Heatmap} map */
  constructor(map) {
    this.map = map;
    /** @type {Map<number, {x: number, y: number}>} */
    this.down = new Map();
    this.travelled = 0;
    const { canvas } = map;
    canvas.addEventListener("pointerdown", (event) => this.press(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    canvas.addEventListener("pointerup", (event) => this.release(event));
    canvas.addEventListener("pointercancel", (event) => this.down.delete(event.pointerId));
    canvas.addEventListener("pointerleave", () => map.hover(null, 0, 0));
    canvas.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    canvas.addEventListener("dblclick", () => this.fit());
    canvas.addEventListener("keydown", (event) => this.key(event));
  }

  /** @param {PointerEvent | WheelEvent} event */
  place(event) {
    const box = this.map.canvas.getBoundingClientRect();
    return { x: event.clientX - box.left, y: event.clientY - box.top };
  }

  /** @param {PointerEvent} event */
  press(event) {
    if (event.button) return;
    this.map.canvas.setPointerCapture(event.pointerId);
    this.down.set(event.pointerId, this.place(event));
    if (this.down.size === 1) this.travelled = 0;
  }

  /** @param {PointerEvent} event */
  move(event) {
    const now = this.place(event);
    const before = this.down.get(event.pointerId);
    if (!before) {
      this.map.hover(this.map.cellAt(now.x, now.y), now.x, now.y);
      return;
    }
    if (this.down.size === 2) this.pinch(event.pointerId, now);
    else if (this.map.zoomed) this.map.pan(now.x - before.x, now.y - before.y);
    this.travelled += Math.hypot(now.x - before.x, now.y - before.y);
    this.down.set(event.pointerId, now);
  }

  /** @param {number} moving @param {{x: number, y: number}} now */
  pinch(moving, now) {
    const before = /** @type {{x: number, y: number}} */ (this.down.get(moving));
    const [still] = [...this.down].filter(([id]) => id !== moving).map(([, place]) => place);
    const distance = Math.hypot(before.x - still.x, before.y - still.y);
    const wanted = Math.hypot(now.x - still.x, now.y - still.y);
    if (distance > 8) this.map.zoom(wanted / distance, (now.x + still.x) / 2, (now.y + still.y) / 2);
  }

  /** @param {PointerEvent} event */
  release(event) {
    this.down.delete(event.pointerId);
    if (this.travelled > 5) return;
    const { x, y } = this.place(event);
    const at = this.map.cellAt(x, y);
    if (!at) return;
    this.map.options.pick(at.row, at.col);
    if (event.pointerType === "touch") this.map.hover(at, x, y);
  }

  /** @param {WheelEvent} event */
  wheel(event) {
    event.preventDefault();
    const { x, y } = this.place(event);
    if (event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY)) {
      this.map.pan(-(event.deltaX || event.deltaY), 0);
    } else this.map.zoom(Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.0022)), x, y);
  }

  fit() {
    for (const map of [this.map, ...this.map.mates]) {
      map.fit();
      map.announceLegend();
      map.draw();
    }
  }

  /** @param {KeyboardEvent} event */
  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const { map } = this;
    const at = map.options.cursor();
    const { rows, cols } = map.plane;
    const big = event.shiftKey ? 10 : 1;
    const down = map.options.upward ? -big : big;
    /** @type {Record<string, [number, number]>} */
    const moves = { ArrowUp: [-down, 0], ArrowDown: [down, 0], ArrowLeft: [0, -big], ArrowRight: [0, big] };
    const [px, py] = at ? map.pointOf(at.row, at.col) : [map.width / 2, map.height / 2];
    if (event.key in moves) {
      const [dr, dc] = moves[event.key];
      const from = at ?? { row: Math.max(map.options.markedRow?.() ?? 0, 0), col: 0 };
      const row = Math.min(Math.max(from.row + (at ? dr : 0), 0), rows - 1);
      const col = Math.min(Math.max(from.col + (at ? dc : 0), 0), cols - 1);
      map.reveal(row, col);
      map.options.pick(row, col);
    } else if (event.key === "Home" || event.key === "End") {
      const col = event.key === "Home" ? 0 : cols - 1;
      map.reveal(at?.row ?? 0, col);
      map.options.pick(at?.row ?? 0, col);
    } else if (event.key === "+" || event.key === "=") map.zoom(1.5, px, py);
    else if (event.key === "-") map.zoom(1 / 1.5, px, py);
    else if (event.key === "0") this.fit();
    else return;
    event.preventDefault();
    event.stopPropagation();
  }
}
