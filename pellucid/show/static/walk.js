"use strict";
// Pictures of tensors, drawn when they come into view. Values are float16 in units of the scale's
// limit; infinity marks what a token may not look at.
const data = JSON.parse(document.getElementById("data").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const reading = document.getElementById("reading");

function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  const values = new Float32Array(bytes.length / 2);
  for (let i = 0; i < values.length; i++) {
    const half = view.getUint16(2 * i, true);
    const sign = half & 0x8000 ? -1 : 1, power = (half >> 10) & 31, rest = half & 1023;
    if (power === 31) values[i] = rest ? NaN : sign * Infinity;
    else values[i] = sign * (power ? 2 ** (power - 15) * (1 + rest / 1024) : 2 ** -24 * rest);
  }
  return values;
}

function colour(unit) {
  const stops = dark.matches ? data.dark : data.light;
  if (Number.isNaN(unit)) return "#c2188b";
  const place = ((Math.max(-1, Math.min(1, unit)) + 1) / 2) * (stops.length - 1);
  const low = Math.min(Math.floor(place), stops.length - 2), share = place - low;
  const mix = [1, 3, 5].map((at) => {
    const a = parseInt(stops[low].slice(at, at + 2), 16), b = parseInt(stops[low + 1].slice(at, at + 2), 16);
    return Math.round(a + (b - a) * share);
  });
  return `rgb(${mix.join(",")})`;
}

function prepare(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  const style = getComputedStyle(document.documentElement);
  pen.ink = style.getPropertyValue("--soft");
  pen.line = style.getPropertyValue("--line");
  pen.mark = style.getPropertyValue("--ink");
  pen.paper = style.getPropertyValue("--paper");
  pen.font = "11px ui-monospace, 'DejaVu Sans Mono', monospace";
  return pen;
}

function hatch(pen, x, y, width, height) {
  pen.save();
  pen.beginPath();
  pen.rect(x, y, width, height);
  pen.clip();
  pen.strokeStyle = pen.line;
  pen.beginPath();
  const start = Math.floor((x - y - height) / 6) * 6;
  for (let offset = start; offset < x + width - y; offset += 6) {
    pen.moveTo(y + offset, y);
    pen.lineTo(y + height + offset, y + height);
  }
  pen.stroke();
  pen.restore();
}

function every(count, room, size) { return Math.max(1, Math.ceil((count * size) / Math.max(room, 1))); }

function drawMap(figure, picture, values) {
  const [rows, columns] = picture.shape, canvas = figure.querySelector("canvas");
  const room = Math.max(200, figure.clientWidth);
  const left = picture.rows ? 118 : 8, top = picture.columns ? 92 : 4;
  const most = picture.kind === "attention" ? 34 : 24;
  const cellWidth = Math.min(most, (room - left - 8) / columns);
  const tallest = picture.kind === "attention" ? cellWidth : Math.min(most, 320 / rows);
  const cellHeight = Math.max(rows === 1 ? 20 : 2, Math.min(cellWidth < 2 ? 6 : most, tallest));
  const width = left + columns * cellWidth + 8, height = top + rows * cellHeight + 6;
  const pen = prepare(canvas, width, height);
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      const unit = values[row * columns + column];
      const x = left + column * cellWidth, y = top + row * cellHeight;
      if (unit === Infinity) hatch(pen, x, y, cellWidth, cellHeight);
      else {
        pen.fillStyle = colour(unit);
        pen.fillRect(x, y, cellWidth + 0.4, cellHeight + 0.4);
      }
    }
  }
  pen.strokeStyle = pen.line;
  pen.strokeRect(left - 0.5, top - 0.5, columns * cellWidth + 1, rows * cellHeight + 1);
  pen.fillStyle = pen.ink;
  pen.textBaseline = "middle";
  if (picture.rows) {
    pen.textAlign = "right";
    const step = every(rows, rows * cellHeight, 12);
    for (let row = 0; row < rows; row += step)
      pen.fillText(data.tokens[row] ?? row, left - 6, top + (row + 0.5) * cellHeight, left - 10);
  }
  if (picture.columns) {
    pen.textAlign = "left";
    const step = every(columns, columns * cellWidth, 12);
    for (let column = 0; column < columns; column += step) {
      pen.save();
      pen.translate(left + (column + 0.5) * cellWidth, top - 6);
      pen.rotate(-Math.PI / 3);
      pen.fillText(data.tokens[column] ?? column, 0, 0, 96);
      pen.restore();
    }
  }
  const name = (index, isToken) => (isToken && data.tokens[index] !== undefined ? `${index} “${data.tokens[index]}”` : index);
  return {
    rows, columns, left, top, cellWidth, cellHeight,
    tell(row, column) {
      const unit = values[row * columns + column];
      const value = unit === Infinity ? "masked" : Number((unit * picture.limit).toPrecision(4));
      if (picture.columns) return `query ${name(row, true)} → key ${name(column, true)}: ${value}`;
      if (rows === 1 && !picture.rows) return `number ${column}: ${value}`;
      return `${picture.rows ? "token" : "row"} ${name(row, picture.rows)}, number ${column}: ${value}`;
    },
    mark(row, column) {
      const x = left + column * cellWidth, y = top + row * cellHeight;
      const wide = Math.max(cellWidth, 5), tall = Math.max(cellHeight, 5);
      for (const [line, thick] of [[pen.paper, 4], [pen.mark, 2]]) {
        pen.strokeStyle = line;
        pen.lineWidth = thick;
        pen.strokeRect(x + (cellWidth - wide) / 2, y + (cellHeight - tall) / 2, wide, tall);
      }
      pen.lineWidth = 1;
    },
  };
}

function drawRays(figure, picture, values, position) {
  const [tokens, pairs] = picture.shape, canvas = figure.querySelector("canvas");
  const size = Math.min(340, Math.max(220, figure.clientWidth)), centre = size / 2, radius = centre - 26;
  const pen = prepare(canvas, size, size), stops = dark.matches ? data.dark : data.light;
  pen.strokeStyle = pen.line;
  pen.beginPath();
  pen.arc(centre, centre, radius, 0, 2 * Math.PI);
  pen.moveTo(8, centre); pen.lineTo(size - 8, centre);
  pen.moveTo(centre, 8); pen.lineTo(centre, size - 8);
  pen.stroke();
  const largest = picture.limit || 1;
  for (let pair = 0; pair < pairs; pair++) {
    const at = 2 * (position * pairs + pair);
    const x = centre + radius * values[at] * largest, y = centre - radius * values[at + 1] * largest;
    pen.strokeStyle = pen.fillStyle = stops[pair < pairs / 2 ? 2 : 8];
    pen.globalAlpha = 0.35 + 0.65 * (1 - pair / pairs);
    pen.beginPath(); pen.moveTo(centre, centre); pen.lineTo(x, y); pen.stroke();
    pen.beginPath(); pen.arc(x, y, 2.6, 0, 2 * Math.PI); pen.fill();
  }
  pen.globalAlpha = 1;
  pen.fillStyle = pen.mark;
  pen.fillText(`position ${position}  ${data.tokens[position] ?? ""}`, 8, 14);
  return { position, tokens };
}

function show(text) { reading.hidden = !text; reading.textContent = text || ""; }

function set(figure) {
  const picture = data.pictures[figure.dataset.of];
  const canvas = figure.querySelector("canvas"), values = unpack(picture.data);
  if (picture.kind === "rays") {
    let state = drawRays(figure, picture, values, picture.shape[0] - 1);
    const turn = (by) => {
      const next = (state.position + by + state.tokens) % state.tokens;
      state = drawRays(figure, picture, values, next);
    };
    canvas.addEventListener("click", () => turn(1));
    canvas.addEventListener("keydown", (event) => {
      if (event.key === "ArrowRight" || event.key === "ArrowLeft") {
        event.preventDefault();
        turn(event.key === "ArrowRight" ? 1 : -1);
      }
    });
    figure.redraw = () => { state = drawRays(figure, picture, values, state.position); };
    return;
  }
  let map = drawMap(figure, picture, values), row = 0, column = 0, read = false;
  // The cell that is read is marked; nothing is once the picture is left.
  const tell = (holds = true) => {
    if (read || holds) map = drawMap(figure, picture, values);
    read = holds;
    if (holds) map.mark(row, column);
    show(holds ? `${figure.dataset.of}   ${map.tell(row, column)}` : "");
  };
  const point = (event) => {
    const box = canvas.getBoundingClientRect(), grow = parseFloat(canvas.style.width) / box.width;
    const at = [Math.floor(((event.clientY - box.top) * grow - map.top) / map.cellHeight),
      Math.floor(((event.clientX - box.left) * grow - map.left) / map.cellWidth)];
    const inside = at[0] >= 0 && at[1] >= 0 && at[0] < map.rows && at[1] < map.columns;
    if (inside && read && at[0] === row && at[1] === column) return;
    if (inside) [row, column] = at;
    if (inside || read) tell(inside);
  };
  canvas.addEventListener("pointermove", (event) => event.pointerType === "mouse" && point(event));
  canvas.addEventListener("pointerdown", point);
  canvas.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && read && tell(false));
  canvas.addEventListener("focus", () => canvas.matches(":focus-visible") && tell());
  canvas.addEventListener("blur", () => read && tell(false));
  canvas.addEventListener("keydown", (event) => {
    const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!move) return;
    event.preventDefault();
    row = Math.max(0, Math.min(map.rows - 1, row + move[0]));
    column = Math.max(0, Math.min(map.columns - 1, column + move[1]));
    tell();
  });
  figure.redraw = () => {
    map = drawMap(figure, picture, values);
    if (read) map.mark(row, column);
  };
}

const figures = [...document.querySelectorAll("figure[data-of]")];
const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    watcher.unobserve(entry.target);
    set(entry.target);
  }
}, { rootMargin: "1200px" });
figures.forEach((figure) => watcher.observe(figure));
const again = () => figures.forEach((figure) => figure.redraw && figure.redraw());
dark.addEventListener("change", again);
addEventListener("resize", again);
addEventListener("beforeprint", () => figures.forEach((figure) => {
  if (!figure.redraw) { watcher.unobserve(figure); set(figure); }
}));

// The contents: folded on a phone, and the step that is being read is marked.
const contents = document.getElementById("contents"), where = document.getElementById("where");
const narrow = matchMedia("(max-width: 900px)");
const fold = () => { contents.open = !narrow.matches; };
narrow.addEventListener("change", fold);
fold();
contents.addEventListener("click", (event) => { if (narrow.matches && event.target.closest("a")) contents.open = false; });
const links = new Map([...contents.querySelectorAll("li a")].map((link) => [link.hash.slice(1), link]));
const articles = [...document.querySelectorAll("article[id]")];
function markPlace() {
  let at = articles[0];
  for (const article of articles) {
    if (article.getBoundingClientRect().top > 120) break;
    at = article;
  }
  const link = links.get(at?.id), before = contents.querySelector("[aria-current]");
  if (!link || link === before) return;
  before?.removeAttribute("aria-current");
  link.setAttribute("aria-current", "step");
  where.textContent = link.textContent;
  if (!narrow.matches) link.scrollIntoView({ block: "nearest" });
}
let waiting = false;
addEventListener("scroll", () => {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; markPlace(); });
}, { passive: true });
markPlace();
// A word's meaning where it stands; a second tap follows it to the list.
let asked = null;
document.addEventListener("click", (event) => {
  const word = event.target.closest("a.word");
  if (word && word !== asked && !matchMedia("(hover: hover)").matches) {
    event.preventDefault();
    show(word.title);
  } else if (asked && !event.target.closest("canvas")) show("");
  asked = word;
});
