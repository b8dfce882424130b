// What the page shows, as signals: model, run, place. The URL is written from it and read into it.

import { batch, computed, effect, signal } from "./signals.js";
import { format, fromHash, leafOf, layerOf, nameOf, parse, toHash } from "./address.js";
import { ApiError, connection, get, post } from "./data/api.js";
import { isBridged, tellPlace } from "./data/bridge.js";

/**
 * @typedef {{name: string, family: string, parameters: number, layers: number, heads: number,
 *   kv_heads: number, head_dim: number, width: number, mlp_width: number, vocabulary: number,
 *   context: number, dtype: string, features: string[], prompt: string}} Model
 * @typedef {{id: string, name: string, title: string, formula: string, sentence: string,
 *   kind: string, layer: number | null, shape: number[], dims: string[], dtype: string}} Step
 * @typedef {{at: string, do: string, value?: number, from?: string, direction?: string}} Edit
 * @typedef {{run: string, model: string, prompt: string, ids: number[], tokens: string[],
 *   edits: Edit[], python: string, steps: Step[], seconds: number, bytes: number}} Run
 * @typedef {{row: number, col: number}} Cell
 * @typedef {{what: string, value: number | string | null, limit: number | string | null, holds: boolean}} Check
 * @typedef {{step: string, title: string, formula: string, source: {file: string, first: number, lines: string[]} | null,
 *   code: string, walk: string, checks: Check[]}} Card
 * @typedef {"map" | "walk" | "heads" | "lens" | "parts" | "generate" | "try" | "compare"} Room
 * Prompt null: that of the shown run.
 * @typedef {{model: string, prompt: string | null, edits: Edit[], run: string}} Rival
 * @typedef {{model: string, prompt?: string, ids?: number[], edits?: Edit[], like?: string}} Wanted
 */

export const ROOMS = /** @type {const} */ ([
  ["map", "Map"], ["walk", "Walk"], ["heads", "Heads"], ["lens", "Lens"],
  ["parts", "Contributions"], ["generate", "Generate"], ["try", "Experiment"],
  ["compare", "Compare"]]);

export const models = signal(/** @type {Model[]} */ ([]));
export const modelName = signal("");
export const run = signal(/** @type {Run | null} */ (null));
export const prompt = signal("");
export const room = signal(/** @type {Room} */ ("map"));
export const leaf = signal("embed");
export const layer = signal(0);
export const head = signal(0);
export const token = signal(0);
export const cell = signal(/** @type {Cell | null} */ (null));
export const bend = signal(/** @type {import("./data/scale.js").Bend | ""} */ (""));
export const picture = signal("");
export const chosenToken = signal(/** @type {number | null} */ (null)); // whose logit is explained
export const busy = signal(/** @type {{what: string, since: number, stop: () => void} | null} */ (null));
export const trouble = signal(/** @type {{said: string, again?: () => void} | null} */ (null));
export const live = signal(""); // what a screen reader hears
export const card = signal(/** @type {Card | null} */ (null)); // of the step, once it has come
export const rival = signal(/** @type {Rival | null} */ (null)); // what the shown run is compared with
export const runs = signal(/** @type {Run[]} */ ([])); // of this visit, the newest first

export const model = computed(() => models.value.find((m) => m.name === modelName.value) ?? null);
export const stepById = computed(() => new Map((run.value?.steps ?? []).map((s) => [s.id, s])));
export const step = computed(() =>
  stepById.value.get(nameOf(leaf.value, layer.value)) ?? stepById.value.get(leaf.value) ?? null);

/** @param {Run | null} of */
export function modelOf(of) {
  return models.peek().find((m) => m.name === of?.model) ?? null;
}

/** Which head of a tensor belongs to the chosen query head. @param {Step} one @param {Model | null} own */
export function headOf(one, own = model.peek()) {
  const group = one.dims[0] === "Hkv" ? (own?.heads ?? 1) / (own?.kv_heads ?? 1) : 1;
  return Math.floor(Math.min(head.value, (own?.heads ?? 1) - 1) / group);
}

/** Whether a tensor has an axis of heads. @param {Step} one */
export function hasHeads(one) {
  return one.shape.length === 3;
}

/** The index of the place inside its tensor. @param {Step} one @returns {number[]} */
export function indexOf(one) {
  const lead = hasHeads(one) ? [headOf(one)] : [];
  const at = cell.value;
  if (!at) return lead;
  return one.shape.length === 1 ? [at.col] : [...lead, at.row, at.col];
}

export const address = computed(() => (step.value ? format(step.value.name, indexOf(step.value)) : ""));

/** The ledger: the steps around the blocks and those of one block. */
export const ledger = computed(() => {
  const here = step.value?.layer ?? layer.value;
  return (run.value?.steps ?? []).filter((s) => s.layer === null || s.layer === here);
});

/**
 * Go to a step by id; layer, head and token stay.
 * @param {string} id
 * @param {Cell | null} [at]
 */
export function goTo(id, at = null) {
  batch(() => {
    const from = step.peek();
    leaf.value = leafOf(id);
    layer.value = layerOf(id) ?? layer.peek();
    const to = step.value;
    const alike = from && to && String(from.dims) === String(to.dims);
    if (at || !alike) cell.value = at;
    if (at && to?.dims.at(-2) === "T") token.value = at.row;
    if (!["walk", "compare"].includes(room.peek())) room.value = "walk";
  });
}

/**
 * Go to an address, such as one typed; throws for one that this run has not.
 * @param {string} text
 */
export function goToAddress(text) {
  const { name, index } = parse(text);
  const to = stepById.peek().get(name) ?? run.peek()?.steps.find((s) => s.name === name);
  if (!to) throw new Error(`${name} is no tensor of this run`);
  const numbers = index.filter((i) => typeof i === "number");
  if (numbers.length > to.shape.length || numbers.some((n, axis) => n >= to.shape[axis])) {
    throw new Error(`${text}: ${name} has the shape ${to.shape.join(" × ")}`);
  }
  batch(() => {
    leaf.value = leafOf(to.id);
    layer.value = to.layer ?? layer.peek();
    const rest = [...numbers];
    if (hasHeads(to) && rest.length) takeHead(to, /** @type {number} */ (rest.shift()));
    if (to.shape.length === 1) cell.value = rest.length ? { row: 0, col: rest[0] } : null;
    else cell.value = rest.length === 2 ? { row: rest[0], col: rest[1] } : null;
    if (rest.length && to.dims.at(-2) === "T") token.value = rest[0];
    if (to.dims.at(-1) === "T" && to.shape.length === 1 && rest.length) token.value = rest[0];
    if (room.peek() !== "compare") room.value = "walk";
  });
}

/** @param {Step} to @param {number} index */
function takeHead(to, index) {
  const own = model.peek();
  const group = to.dims[0] === "Hkv" && own ? own.heads / own.kv_heads : 1;
  if (Math.floor(head.peek() / group) !== index) head.value = index * group;
}

/** Ledger steps before or after. @param {number} by */
export function stepBy(by) {
  const rows = ledger.peek();
  const here = rows.findIndex((s) => s.id === step.peek()?.id);
  const next = rows[Math.min(Math.max(here + by, 0), rows.length - 1)];
  if (next) goTo(next.id);
}

/** @param {number} by */
export function layerBy(by) {
  const most = (model.peek()?.layers ?? 1) - 1;
  layer.value = Math.min(Math.max(layer.peek() + by, 0), most);
}

/** @param {number} by */
export function headBy(by) {
  const heads = model.peek()?.heads ?? 1;
  head.value = (head.peek() + by + heads) % heads;
}

/** @param {number} by */
export function tokenBy(by) {
  const most = (run.peek()?.ids.length ?? 1) - 1;
  token.value = Math.min(Math.max(token.peek() + by, 0), most);
}

/** Say what went wrong and what can be done. @param {unknown} error @param {() => void} [again] */
export function report(error, again) {
  if (/** @type {Error} */ (error).name === "AbortError") return;
  trouble.value = { said: /** @type {Error} */ (error).message, again };
}

/**
 * Run a prompt; the newer request ends the older one. The manifest, or null where it failed.
 * @param {Wanted} wanted
 * @param {boolean} [show] whether the page turns to it
 * @returns {Promise<Run | null>}
 */
export async function startRun(wanted, show = true) {
  busy.peek()?.stop();
  const control = new AbortController();
  const mine = { what: "running the prompt", since: performance.now(), stop: () => control.abort() };
  busy.value = mine;
  trouble.value = null;
  try {
    const made = await post("/api/runs", wanted, control.signal);
    if (show) adopt(made);
    else noteRun(made);
    return made;
  } catch (error) {
    report(error, () => startRun(wanted, show));
    return null;
  } finally {
    if (busy.peek() === mine) busy.value = null;
  }
}

/** @param {Run} made */
function noteRun(made) {
  runs.value = [made, ...runs.peek().filter((r) => r.run !== made.run)].slice(0, 24);
}

/** Show a run. @param {Run} made */
export function adopt(made) {
  batch(() => {
    const before = run.peek();
    const alike = before?.model === made.model && String(before.ids) === String(made.ids);
    if (alike) made = { ...made, prompt: before.prompt }; // ids decode to a text with special tokens
    run.value = made;
    modelName.value = made.model;
    prompt.value = made.prompt;
    noteRun(made);
    if (!alike) {
      token.value = made.ids.length - 1;
      cell.value = null;
      chosenToken.value = null;
    }
    const own = model.value;
    layer.value = Math.min(layer.value, (own?.layers ?? 1) - 1);
    head.value = Math.min(head.value, (own?.heads ?? 1) - 1);
    if (!step.value) leaf.value = "embed";
  });
}

/** The hash that reopens this view. */
export const hash = computed(() => toHash({
  model: modelName.value, run: run.value?.run ?? "", address: address.value,
  options: {
    view: room.value, layer: leaf.value.includes("layers") || step.value?.layer !== null ? "" : String(layer.value),
    head: String(head.value), token: String(token.value),
    id: chosenToken.value === null ? "" : String(chosenToken.value),
    scale: bend.value, picture: picture.value, prompt: run.value?.prompt.slice(0, 2000) ?? "",
    edits: run.value?.edits?.length ? JSON.stringify(run.value.edits) : "",
    rival: room.value === "compare" && rival.value ? JSON.stringify(rival.value) : "",
  },
}));

/** What tells one entry of the browser's history from the next. */
const entry = computed(() => [modelName.value, run.value?.run, room.value, step.value?.id, rival.value?.model].join(" "));

/** When the server is back, all that is shown is asked for again. */
export function followServer() {
  let before = connection.peek();
  effect(() => {
    const now = connection.value;
    if (before === "gone" && now === "ok" && run.peek()) run.value = { .../** @type {Run} */ (run.peek()) };
    before = now;
  });
}

/** Keep the address bar up to date and obey it when it is edited or walked back. */
export function followUrl() {
  let last = entry.peek();
  effect(() => {
    const [to, now] = [hash.value, entry.value];
    if (!run.value || to === location.hash) return;
    if (isBridged()) return tellPlace(to);
    if (now === last) history.replaceState(null, "", to);
    else history.pushState(null, "", to);
    last = now;
  });
  addEventListener("popstate", () => {
    if (location.hash !== hash.peek()) open(location.hash);
  });
}

/** Open what a hash says; runs the prompt in it again where the server dropped the run. @param {string} text */
export async function open(text) {
  const place = fromHash(text);
  trouble.value = null;
  batch(() => {
    modelName.value = known(place) ? place.model : models.peek()[0]?.name ?? "";
    const asked = ROOMS.find(([name]) => name === place.options.view);
    room.value = asked ? asked[0] : "map";
    prompt.value = place.options.prompt ?? model.value?.prompt ?? "";
  });
  const made = await findRun(place);
  if (made) batch(() => settle(made, place));
  if (!place.model || known(place)) return;
  const served = models.peek().map((m) => m.name).join(", ");
  report(new Error(`This link needs the model ${place.model}; served here: ${served}. Start: `
    + `pellucid serve ${place.model}`));
}

/** Whether a link is about a model that is served here. @param {import("./address.js").Place} place */
function known(place) {
  return models.peek().some((m) => m.name === place.model);
}

/** @param {import("./address.js").Place} place */
async function findRun(place) {
  const wanted = { model: modelName.peek(), prompt: prompt.peek(), edits: JSON.parse(place.options.edits || "[]") };
  if (run.peek()?.run === place.run) return run.peek();
  if (!known(place) || !place.run) return startRun(wanted);
  try {
    return await get(`/api/runs/${encodeURIComponent(place.run)}`);
  } catch (error) {
    if (error instanceof ApiError && error.status === 404 && place.options.prompt) return startRun(wanted);
    report(error, () => open(location.hash));
    return null;
  }
}

/** @param {Run} made @param {import("./address.js").Place} place */
function settle(made, place) {
  const { options } = place;
  const asked = room.peek();
  if (run.peek()?.run !== made.run) adopt(made);
  if (options.layer) layer.value = Number(options.layer);
  if (options.head) head.value = Number(options.head);
  if (options.id) chosenToken.value = Number(options.id);
  bend.value = /** @type {any} */ (options.scale ?? "");
  picture.value = options.picture ?? "";
  try {
    if (options.rival) rival.value = JSON.parse(options.rival);
    if (place.address && known(place)) goToAddress(place.address);
  } catch (error) {
    report(error);
  }
  if (options.token) token.value = Math.min(Number(options.token), made.ids.length - 1);
  room.value = asked;
}
