// The page of a diff: choose a tensor, see R, B and their difference. Everything else is HTML.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const detail = document.getElementById("detail");
const order = Object.keys(data.tensors);
const dark = matchMedia("(prefers-color-scheme: dark)");
const ZERO = 125, STRONGEST = 250, NOT_FINITE = 253, NOTHING = 255;
let chosen = null;

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function rgb(hex) {
  return [1, 3, 5].map((place) => parseInt(hex.slice(place, place + 2), 16));
}

// 251 colours between the given ones
function ramp(hexes) {
  const stops = hexes.map(rgb);
  return Array.from({ length: STRONGEST + 1 }, (_, level) => {
    const at = (level / STRONGEST) * (stops.length - 1);
    const low = Math.min(Math.floor(at), stops.length - 2);
    return stops[low].map((from, c) => from + (stops[low + 1][c] - from) * (at - low));
  });
}

const theme = () => (dark.matches ? "dark" : "light");
const unpack = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
const number = (value) =>
  value === 0 ? "0" : Math.abs(value) >= 1e-3 && Math.abs(value) < 1e4
    ? String(Number(value.toPrecision(2))) : value.toExponential(1);

function valueAt(level, limit) {
  if (level === NOTHING) return "switched off";
  if (level === NOT_FINITE) return "not finite";
  return number(((level - ZERO) / ZERO) * limit);
}

function errorAt(level) {
  if (level === NOTHING || level === 0) return "0";
  if (level === NOT_FINITE) return "not finite";
  return number(10 ** (level / 25 - 9));
}

function paint(canvas, levels, colours, columns, rows) {
  canvas.width = columns;
  canvas.height = rows;
  const context = canvas.getContext("2d");
  const image = context.createImageData(columns, rows);
  const bad = rgb(data.not_finite);
  levels.forEach((level, place) => {
    if (level === NOTHING) return;
    const colour = level === NOT_FINITE ? bad : colours[level];
    image.data.set([...colour, 255], 4 * place);
  });
  context.putImageData(image, 0, 0);
}

const WORDS = { B: "row", T: "token", S: "key", H: "head", Hkv: "kv head", V: "vocabulary entry" };

function place(dims, index, block) {
  const first = index * block, last = first + block - 1;
  const word = WORDS[dims] || "channel";
  return block === 1 ? `${word} ${first}` : `${word}s ${first} to ${last}`;
}

function describe(entry, maps, panel, row, column) {
  const picture = entry.picture, at = (panel * picture.rows + row) * picture.columns + column;
  const dims = entry.dims.length > 1 ? entry.dims.slice(-2) : ["", ...entry.dims.slice(-1)];
  const [down, across] = picture.block;
  const where = [picture.heads[panel], dims[0] && place(dims[0], row, down),
    place(dims[1], column, across)].filter(Boolean).join(", ");
  const many = down * across > 1 ? " (the farthest apart there)" : "";
  return `${where}: R ${valueAt(maps.reference[at], picture.limit)}, ` +
    `B ${valueAt(maps.seen[at], picture.limit)}, error ${errorAt(maps.error[at])}${many}`;
}

function figure(title, told, entry, maps, kind, width, readout) {
  const { panels, rows, columns, limit, heads } = entry.picture;
  const hexes = (kind === "error" ? data.errors : data.values)[theme()];
  const colours = ramp(hexes), size = rows * columns;
  const abreast = Math.max(1, Math.min(panels, Math.round(Math.sqrt((panels * rows) / columns * 1.6))));
  const across = Math.max(1, Math.min(22, (width - 8 * (abreast - 1)) / abreast / columns));
  const down = Math.max(3, Math.min(22, across, 340 / rows));
  const body = make("div", { class: "panels" });
  for (let panel = 0; panel < panels; panel++) {
    const canvas = make("canvas", { role: "img", "aria-label": `${title}, ${heads[panel] || "all"}` });
    paint(canvas, maps[kind].subarray(panel * size, (panel + 1) * size), colours, columns, rows);
    canvas.style.width = `${across * columns}px`;
    canvas.style.height = `${down * rows}px`;
    canvas.addEventListener("mousemove", (event) => {
      const box = canvas.getBoundingClientRect();
      const column = Math.min(columns - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * columns)));
      const row = Math.min(rows - 1, Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * rows)));
      readout.textContent = describe(entry, maps, panel, row, column);
    });
    const label = panels > 1 ? [make("span", {}, heads[panel])] : [];
    body.append(make("div", {}, ...label, canvas));
  }
  const bar = make("i");
  bar.style.background = `linear-gradient(90deg, ${hexes.join(", ")})`;
  const [low, high] = kind === "error" ? ["10⁻⁹", "10"] : [number(-limit), number(limit)];
  const caption = make("figcaption");
  caption.append(make("b", {}, title), ` ${told}`);
  return make("figure", {}, caption, body, make("div", { class: "scale" }, low, bar, high));
}

function drawn(entry) {
  const readout = make("p", { class: "readout" });
  const picture = entry.picture;
  const seen = unpack(picture.seen);
  const maps = { seen, error: unpack(picture.error),
    reference: picture.reference ? unpack(picture.reference) : seen };
  const wide = picture.panels === 1 && picture.columns > 2.2 * picture.rows && picture.columns > 90;
  const inner = detail.clientWidth - 42;
  const narrow = matchMedia("(max-width: 760px)").matches;
  const width = wide || narrow ? inner : (inner - 36) / 3;
  const body = make("div", { class: wide ? "maps wide" : "maps" },
    figure("R", entry.verdict === "identical" ? "the same" : "what A's arithmetic gives, exactly", entry, maps, "reference", width, readout),
    figure("B", "what it has", entry, maps, "seen", width, readout),
    figure("Error", "|B − R| over the RMS of R", entry, maps, "error", width, readout));
  let worst = 0;
  maps.error.forEach((level, at) => {
    const rank = level === NOTHING ? -1 : level;
    if (rank > (maps.error[worst] === NOTHING ? -1 : maps.error[worst])) worst = at;
  });
  const size = picture.rows * picture.columns;
  readout.textContent = "Largest error: " + describe(entry, maps, Math.floor(worst / size),
    Math.floor((worst % size) / picture.columns), worst % picture.columns);
  const parts = [body, readout];
  if (picture.left_out)
    parts.unshift(make("p", { class: "said" },
      `${picture.panels} of ${picture.panels + picture.left_out} are shown, those that differ most.`));
  return parts;
}

function numbers(entry) {
  const text = (error) => (error === null ? "∞" : error === 0 ? "0" : error.toExponential(1));
  if (entry.verdict === "identical" || entry.verdict === "not-judged")
    return make("p", {}, entry.note ||
      (entry.verdict === "identical" ? "Bit for bit what A's arithmetic gives." : ""));
  const rows = [["of what rounding explains", entry.factor],
    ["error of B", text(entry.error_b)], ["error of A's own arithmetic", text(entry.error_a)]];
  if (entry.where) rows.push(["worst slice", entry.where]);
  if (entry.note) rows.push(["note", entry.note]);
  return make("dl", { class: "numbers" }, ...rows.map(([term, said]) =>
    make("div", {}, make("dt", {}, term), make("dd", {}, said))));
}

function statistics(entry) {
  const keys = Object.keys({ ...entry.stats.R, ...entry.stats.B });
  if (!keys.length) return [];
  const head = make("tr", {}, make("th"), ...keys.map((key) => make("th", { class: "number" }, key)));
  const rows = ["R", "B"].map((side) => make("tr", {}, make("th", {}, side),
    ...keys.map((key) => make("td", { class: "number" }, entry.stats[side][key] ?? "–"))));
  return [make("div", { class: "scroll" }, make("table", {}, make("thead", {}, head),
    make("tbody", {}, ...rows)))];
}

function step(label, name) {
  const button = make("button", { type: "button" }, label);
  button.disabled = name === undefined;
  button.addEventListener("click", () => choose(name, true));
  return button;
}

function choose(name, remember) {
  const entry = data.tensors[name];
  if (!entry) return;
  chosen = name;
  const at = order.indexOf(name);
  const bad = order.filter((other) => data.tensors[other].verdict === "diverged");
  const steps = make("span", { class: "steps" }, step("←", order[at - 1]), step("→", order[at + 1]));
  if (bad.length > 1) steps.append(step("next diverged", bad[(bad.indexOf(name) + 1) % bad.length]));
  const shape = entry.shape ? ` ${entry.dims.join(" × ")} = ${entry.shape.join(" × ")}.` : "";
  detail.hidden = false;
  detail.replaceChildren(
    make("h2", {}, make("code", {}, name),
      make("span", { class: `badge ${entry.verdict}` }, entry.verdict.replace("-", " ")), steps),
    make("p", { class: "said" }, `${entry.sentence}${shape}`), numbers(entry));
  if (entry.picture) detail.append(...drawn(entry));
  else if (entry.shape)
    detail.append(make("p", { class: "said" }, "No picture: the page keeps those that differ most."));
  if (entry.stats) detail.append(...statistics(entry));
  const tried = document.querySelector(`details.tried[data-of="${CSS.escape(name)}"]`);
  if (tried) {
    const copy = tried.cloneNode(true);
    copy.open = true;
    detail.append(copy);
  }
  for (const link of document.querySelectorAll(".strip a"))
    link.classList.toggle("chosen", link.dataset.name === name);
  if (remember) history.replaceState(null, "", `#${name}`);
}

document.documentElement.classList.add("scripted");
document.addEventListener("click", (event) => {
  const link = event.target.closest("a[data-name]");
  if (!link) return;
  event.preventDefault();
  choose(link.dataset.name, true);
  if (!link.closest(".strip")) detail.scrollIntoView({ block: "start" });
});
document.addEventListener("keydown", (event) => {
  const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!move || event.altKey || event.ctrlKey || event.metaKey) return;
  const next = order[order.indexOf(chosen) + move];
  if (!next) return;
  event.preventDefault();
  choose(next, true);
  const link = document.querySelector(`.strip a[data-name="${CSS.escape(next)}"]`);
  if (link) link.focus({ preventScroll: true });
});
dark.addEventListener("change", () => choose(chosen, false));
addEventListener("resize", () => choose(chosen, false));
const asked = decodeURIComponent(location.hash.slice(1));
const ratio = (name) => data.tensors[name].ratio ?? Infinity;
choose(data.tensors[asked] ? asked
  : data.first ?? order.reduce((best, name) => (ratio(name) > ratio(best) ? name : best), order[0]), false);
