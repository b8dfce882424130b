// Numbers as text: short ones for pictures, exact ones for reading.

/** A number in about three figures, with a true minus sign. @param {number} value */
export function short(value) {
  if (Number.isNaN(value)) return "NaN";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  if (value === 0) return "0";
  const size = Math.abs(value);
  let text;
  if (Number.isInteger(value) && size < 1e6) text = String(size);
  else if (size >= 1e5 || size < 1e-3) text = size.toExponential(1).replace("e+", "e");
  else text = size >= 1000 ? String(Number(size.toPrecision(3))) : size.toPrecision(3);
  return (value < 0 ? "−" : "") + text;
}

/**
 * A number in as many characters as there is room for: 0.0613, .061, .06, 6e−2.
 * @param {number} value
 * @param {(text: string) => boolean} fits
 */
export function fitting(value, fits) {
  const whole = short(value);
  if (fits(whole)) return whole;
  const sign = value < 0 ? "−" : "";
  const size = Math.abs(value);
  for (const digits of [3, 2, 1]) {
    const text = size >= 1e-3 ? size.toPrecision(digits).replace(/^0\./, ".") : size.toExponential(digits - 1);
    const tried = sign + text.replace("e-", "e−").replace("e+", "e");
    if (fits(tried)) return tried;
  }
  return "";
}

/**
 * The shortest decimal that reads back as the same number of this dtype.
 * @param {number} value
 * @param {string} dtype
 */
export function exact(value, dtype) {
  if (!Number.isFinite(value)) return Number.isNaN(value) ? "nan" : value > 0 ? "inf" : "-inf";
  if (dtype === "float64" || Number.isInteger(value)) return String(value);
  const round = ROUND[dtype] ?? Math.fround;
  for (let digits = 1; digits < 17; digits++) {
    const text = value.toPrecision(digits);
    if (round(Number(text)) === value) return String(Number(text));
  }
  return String(value);
}

const view = new DataView(new ArrayBuffer(4));
/** @param {number} value rounded to bfloat16, ties to even */
function toBfloat16(value) {
  view.setFloat32(0, value);
  const bits = view.getUint32(0);
  view.setUint32(0, (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000);
  return view.getFloat32(0);
}

/** @param {number} value rounded to float16, ties to even */
function toFloat16(value) {
  const size = Math.abs(value);
  const step = size < 2 ** -14 ? 2 ** -24 : 2 ** (Math.floor(Math.log2(size)) - 10);
  const steps = size / step;
  const floor = Math.floor(steps);
  const up = steps - floor > 0.5 || (steps - floor === 0.5 && floor % 2 === 1);
  return Math.sign(value) * (floor + (up ? 1 : 0)) * step;
}

/** @type {Record<string, (value: number) => number>} */
const ROUND = { float32: Math.fround, bfloat16: toBfloat16, float16: toFloat16 };

/** @param {number} probability as a percentage */
export function percent(probability) {
  const hundred = probability * 100;
  if (hundred > 0 && hundred < 0.01) return "<0.01 %";
  return `${hundred >= 99.95 ? hundred.toFixed(2) : hundred.toPrecision(3).slice(0, 5)} %`;
}

/** @param {number} value with thousands apart */
export function count(value) {
  return value.toLocaleString("en-US").replaceAll(",", "\u202f");
}

/** @param {number} value such as 135 M */
export function rough(value) {
  for (const [size, letter] of /** @type {const} */ ([[1e9, "B"], [1e6, "M"], [1e3, "K"]])) {
    if (value >= size) return `${Number((value / size).toPrecision(3))} ${letter}`;
  }
  return String(value);
}

/** @param {number} seconds */
export function duration(seconds) {
  return seconds < 10 ? `${Math.max(1, Math.round(seconds * 1000))} ms` : `${Math.round(seconds)} s`;
}

/** @param {number} bytes */
export function size(bytes) {
  for (const [unit, letter] of /** @type {const} */ ([[2 ** 30, "GB"], [2 ** 20, "MB"], [2 ** 10, "KB"]])) {
    if (bytes >= unit) return `${Number((bytes / unit).toPrecision(3))} ${letter}`;
  }
  return `${bytes} bytes`;
}

/**
 * A token with its white space made visible: ␣ ⏎ ⇥.
 * @param {string} text
 */
export function visible(text) {
  return text.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll("\r", "␍") || "∅";
}
