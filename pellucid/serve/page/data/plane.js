// Two axes of a tensor, as a picture needs them: an overview at once, exact tiles where one looks.

import { signal } from "../signals.js";
import { format } from "../address.js";
import { tensor } from "./tensors.js";
import { rangeOf } from "./scale.js";

export const TILE = 256;
const WHOLE = 1 << 19; // up to this many cells are fetched in one piece
const OVERVIEW = 512; // rows and columns of an overview at most

/** @typedef {Float32Array | Float64Array} Values */
/** @typedef {{data: Values, rows: number, cols: number}} Overview */
/** @typedef {ReturnType<typeof rangeOf>} Range */

/** What a heat map draws. */
export class Plane {
  /**
   * @param {number} rows
   * @param {number} cols
   * @param {string} dtype
   */
  constructor(rows, cols, dtype = "float32") {
    this.rows = rows;
    this.cols = cols;
    this.dtype = dtype;
    /** Grows when there is more to draw. */
    this.version = signal(0);
    /** @type {import("../signals.js").Signal<Range | null>} */
    this.range = signal(/** @type {Range | null} */ (null));
    /** @type {Overview | null} */
    this.overview = null;
    /** @type {string} */
    this.reduced = "";
    /** @type {import("../signals.js").Signal<string>} */
    this.error = signal("");
    /** @type {Map<number, Values | null>} */
    this.tiles = new Map();
  }

  get tileRows() {
    return Math.ceil(this.rows / TILE);
  }

  get tileCols() {
    return Math.ceil(this.cols / TILE);
  }

  /** Rows and columns of a tile. @param {number} i @param {number} j */
  extent(i, j) {
    return [Math.min(TILE, this.rows - i * TILE), Math.min(TILE, this.cols - j * TILE)];
  }

  /**
   * The values of a tile, or null while they are on their way.
   * @param {number} i
   * @param {number} j
   * @returns {Values | null}
   */
  tile(i, j) {
    return this.tiles.get(i * this.tileCols + j) ?? null;
  }

  /** The value of a cell, or undefined while it is not here. @param {number} row @param {number} col */
  value(row, col) {
    const found = this.tile(Math.floor(row / TILE), Math.floor(col / TILE));
    const width = this.extent(0, Math.floor(col / TILE))[1];
    return found?.[(row % TILE) * width + (col % TILE)];
  }

  /** Cut a whole into tiles. @param {Values} data */
  take(data) {
    for (let i = 0; i < this.tileRows; i++) {
      for (let j = 0; j < this.tileCols; j++) {
        const [height, width] = this.extent(i, j);
        const tile = new /** @type {any} */ (data.constructor)(height * width);
        for (let row = 0; row < height; row++) {
          const start = (i * TILE + row) * this.cols + j * TILE;
          tile.set(data.subarray(start, start + width), row * width);
        }
        this.tiles.set(i * this.tileCols + j, tile);
      }
    }
    this.range.value = rangeOf(data, this.dtype);
    this.version.value++;
  }
}

/** Numbers that are on the page already. */
export class ArrayPlane extends Plane {
  /**
   * @param {number[][]} rows
   */
  constructor(rows) {
    super(rows.length, rows[0]?.length ?? 0, "float64");
    if (this.cols) this.take(Float64Array.from(rows.flat()));
  }
}

/** Two axes of a tensor on the server. */
export class TensorPlane extends Plane {
  /**
   * @param {string} run
   * @param {string} name
   * @param {number[]} lead index of the axes before
   * @param {number} rows
   * @param {number} cols
   * @param {string} dtype
   * @param {boolean} [flat] whether the tensor has one axis only, drawn as one row
   * @param {string} [minus] a run whose numbers are subtracted
   */
  constructor(run, name, lead, rows, cols, dtype, flat = false, minus = "") {
    super(rows, cols, dtype);
    this.minus = minus;
    this.run = run;
    this.name = name;
    this.lead = lead;
    this.flat = flat;
    if (rows * cols <= WHOLE) this.fetchWhole();
    else this.fetchOverview();
  }

  async fetchWhole() {
    await this.guarded(async () => {
      const found = await tensor(this.run, format(this.name, this.lead), { minus: this.minus });
      this.dtype = found.dtype;
      this.take(found.data);
    });
  }

  async fetchOverview() {
    const to = /** @type {[number, number]} */ ([Math.min(this.rows, OVERVIEW), Math.min(this.cols, OVERVIEW)]);
    await this.guarded(async () => {
      const found = await tensor(this.run, format(this.name, this.lead), { reduce: "absmax", to, minus: this.minus });
      const [rows, cols] = found.shape.slice(-2);
      this.overview = { data: found.data, rows, cols };
      this.reduced = found.reduced || `${Math.ceil(this.rows / rows)}x${Math.ceil(this.cols / cols)}`;
      this.range.value = rangeOf(found.data, this.dtype);
      this.version.value++;
    });
  }

  /** @param {number} i @param {number} j */
  tile(i, j) {
    const key = i * this.tileCols + j;
    if (!this.tiles.has(key) && this.rows * this.cols > WHOLE) {
      this.tiles.set(key, null);
      this.fetchTile(i, j, key);
    }
    return this.tiles.get(key) ?? null;
  }

  /** @param {number} i @param {number} j @param {number} key */
  async fetchTile(i, j, key) {
    const [height, width] = this.extent(i, j);
    /** @type {[number, number][]} */
    const ranges = [[i * TILE, i * TILE + height], [j * TILE, j * TILE + width]];
    await this.guarded(async () => {
      const found = await tensor(this.run, format(this.name, [...this.lead, ...ranges]), { minus: this.minus });
      this.tiles.set(key, found.data);
      this.version.value++;
    });
    if (!this.tiles.get(key)) this.tiles.delete(key);
  }

  /** @param {() => Promise<void>} work */
  async guarded(work) {
    try {
      await work();
      this.error.value = "";
    } catch (error) {
      this.error.value = /** @type {Error} */ (error).message;
    }
  }
}
