// From a number to a colour. Signed values diverge from the paper's own colour at zero; values that
// are never negative grow from it. Lightness alone orders each scale, so it reads without hue.
// What is masked has no colour (drawings hatch it); NaN has one that no scale contains.

/** @typedef {"lin" | "sym" | "log"} Bend */

export const BENDS = /** @type {const} */ ([
  ["lin", "linear"], ["sym", "bent"], ["log", "logarithmic"]]);

const SIGNED = {
  light: ["#0b2c55", "#1c528f", "#4b88bf", "#9cc3df", "#d9e6ea", "#fbfaf8",
    "#f5dfc6", "#eeb483", "#d97b3c", "#ad4a17", "#6b2708"],
  dark: ["#d3ecff", "#8cc6f2", "#4b96d1", "#2d6699", "#223f5a", "#14171c",
    "#4e3421", "#8f4f22", "#d37a33", "#f7b36f", "#ffe9cc"],
};
const SHARE = {
  light: ["#fbfaf8", "#eadff0", "#cdb5dd", "#ab83c3", "#8a53a4", "#652c80", "#3b1150"],
  dark: ["#14171c", "#2c2140", "#4d3470", "#77509f", "#a678c9", "#d3aae8", "#f6e4ff"],
};
const SIZE = {
  light: ["#fbfaf8", "#dbe7e0", "#a9cbbd", "#6da897", "#377f73", "#145850", "#05332f"],
  dark: ["#14171c", "#152c2c", "#1c4a47", "#2c716a", "#4f9e90", "#8acbb8", "#d5f4e6"],
};
const PALETTES = { signed: SIGNED, share: SHARE, size: SIZE };
/** @typedef {keyof typeof PALETTES} Palette */

export const NAN_COLOUR = 0xff8b18c2; // magenta, as the bytes of a pixel in reverse
export const NAN_OTHER = 0xffe2a0f0;
const STEPS = 256;

/** @param {string} hex @returns {[number, number, number]} */
function channels(hex) {
  const value = parseInt(hex.slice(1), 16);
  return [value >> 16, (value >> 8) & 255, value & 255];
}

/** @type {Map<string, Uint32Array>} */
const tables = new Map();

/**
 * 256 pixels from one end of a palette to the other, as ABGR.
 * @param {Palette} palette
 * @param {boolean} dark
 */
export function table(palette, dark) {
  const key = `${palette} ${dark}`;
  const known = tables.get(key);
  if (known) return known;
  const stops = PALETTES[palette][dark ? "dark" : "light"].map(channels);
  const made = new Uint32Array(STEPS);
  for (let i = 0; i < STEPS; i++) {
    const place = (i / (STEPS - 1)) * (stops.length - 1);
    const below = Math.min(Math.floor(place), stops.length - 2);
    const [r, g, b] = [0, 1, 2].map((c) =>
      Math.round(stops[below][c] + (place - below) * (stops[below + 1][c] - stops[below][c])));
    made[i] = ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0;
  }
  tables.set(key, made);
  return made;
}

/** Below this a cell counts as masked: -inf, or the lowest number of a dtype. @param {string} dtype */
export function maskedBelow(dtype) {
  return dtype === "float16" ? -65000 : -3e38;
}

export class Scale {
  /**
   * @param {{palette: Palette, dark: boolean, bend: Bend, limit: number, knee: number, least?: number, dtype?: string, clearZero?: boolean}} how
   * limit: the value of the strongest colour; knee: about where a bent scale stops being linear;
   * clearZero: whether an exact 0 counts as masked, as in what softmax makes of -inf
   */
  constructor({ palette, dark, bend, limit, knee, least = 0, dtype = "float32", clearZero = false }) {
    this.palette = palette;
    this.dark = dark;
    this.bend = bend;
    this.limit = limit > 0 ? limit : 1;
    this.knee = Math.min(Math.max(knee, this.limit * 1e-6), this.limit);
    this.masked = clearZero ? 0 : maskedBelow(dtype);
    this.colours = table(palette, dark);
    this.signed = palette === "signed";
    this.key = [palette, dark, bend, this.limit, this.knee, least, this.masked].join(" ");
    const decades = least > 0 ? Math.log10(this.limit / least) * 1.1 : 4;
    this.decades = Math.min(Math.max(decades, 0.5), 6); // of a logarithmic scale
    this.full = Math.asinh(this.limit / this.knee);
  }

  /** Strength of a value's colour, 0 to 1 of its size. @param {number} size */
  strength(size) {
    if (this.bend === "lin") return size / this.limit;
    if (this.bend === "sym") return Math.asinh(size / this.knee) / this.full;
    return size > 0 ? 1 + Math.log10(size / this.limit) / this.decades : 0;
  }

  /** The value whose colour has this strength. @param {number} strength */
  valueAt(strength) {
    if (this.bend === "lin") return strength * this.limit;
    if (this.bend === "sym") return this.knee * Math.sinh(strength * this.full);
    return strength > 0 ? this.limit * 10 ** (this.decades * (strength - 1)) : 0;
  }

  /** Place of a value in the table of colours. @param {number} value */
  index(value) {
    const strength = Math.min(Math.max(this.strength(Math.abs(value)), 0), 1);
    const place = this.signed ? 0.5 + (value < 0 ? -strength : strength) / 2 : value < 0 ? 0 : strength;
    return Math.round(place * (STEPS - 1));
  }

  /** The pixel of a value: 0 (clear) where it is masked. @param {number} value */
  pixel(value) {
    if (value !== value) return NAN_COLOUR;
    return value <= this.masked ? 0 : this.colours[this.index(value)];
  }

  /** The colour of a value for CSS. @param {number} value */
  css(value) {
    const pixel = this.pixel(value);
    return pixel === 0 ? "transparent" : `rgb(${pixel & 255} ${(pixel >> 8) & 255} ${(pixel >> 16) & 255})`;
  }

  /** Whether dark text reads better than light on a value's colour. @param {number} value */
  wantsDarkText(value) {
    const pixel = this.pixel(value);
    if (pixel === 0) return !this.dark;
    const [r, g, b] = [pixel & 255, (pixel >> 8) & 255, (pixel >> 16) & 255];
    return 0.299 * r + 0.587 * g + 0.114 * b > 140;
  }

  /**
   * Fill pixels with the colours of values.
   * @param {Float32Array | Float64Array} values
   * @param {Uint32Array} pixels
   * @param {number} columns so that NaN can be checkered
   */
  paint(values, pixels, columns) {
    const { colours, signed, masked, bend, limit } = this;
    const linear = bend === "lin";
    const middle = signed ? 127.5 : 0;
    const reach = signed ? 127.5 : 255;
    for (let i = 0; i < values.length; i++) {
      const value = values[i];
      if (value !== value) {
        pixels[i] = ((i % columns) + Math.floor(i / columns)) % 2 ? NAN_COLOUR : NAN_OTHER;
      } else if (value <= masked) {
        pixels[i] = 0;
      } else if (linear) {
        const share = Math.min(Math.max(value / limit, signed ? -1 : 0), 1);
        pixels[i] = colours[Math.round(middle + share * reach)];
      } else {
        pixels[i] = colours[this.index(value)];
      }
    }
  }
}

/**
 * The range of finite values, and the size that most of them stay below.
 * @param {Float32Array | Float64Array} values
 * @param {string} dtype
 */
export function rangeOf(values, dtype) {
  const masked = maskedBelow(dtype);
  const every = Math.max(1, Math.floor(values.length / 20000));
  let [limit, negative, nan, closed] = [0, false, 0, 0];
  const sizes = [];
  for (let i = 0; i < values.length; i++) {
    const value = values[i];
    if (value !== value) nan++;
    else if (value <= masked) closed++;
    else if (value !== Infinity) {
      const size = Math.abs(value);
      if (size > limit) limit = size;
      if (value < 0) negative = true;
      if (i % every === 0 && size > 0) sizes.push(size);
    }
  }
  sizes.sort((a, b) => a - b);
  return { limit, negative, nan, closed, least: sizes[0] ?? 0, knee: sizes[Math.floor(sizes.length * 0.5)] || limit || 1 };
}
