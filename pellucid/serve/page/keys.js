// The keyboard: one table, which the page obeys and `?` lists.

import { batch } from "./signals.js";
import { bend, cell, headBy, layerBy, picture, room, ROOMS, step, stepBy, tokenBy } from "./state.js";
import { nextBend } from "./views/legend.js";
import { picturesOf, shownPicture } from "./views/stage.js";
import { scrubBy } from "./views/generate_room.js";
import { switchTheme } from "./theme.js";
import { openHelp, openPalette } from "./views/dialogs.js";

/** @type {[string, string, () => void][]} key, what it does, how */
export const KEYS = [
  ["j", "next step", () => stepBy(1)],
  ["k", "step before", () => stepBy(-1)],
  ["ArrowUp", "layer above", () => layerBy(1)],
  ["ArrowDown", "layer below", () => layerBy(-1)],
  ["ArrowLeft", "token before", () => tokenBy(-1)],
  ["ArrowRight", "next token", () => tokenBy(1)],
  ["[", "head before", () => headBy(-1)],
  ["]", "next head", () => headBy(1)],
  ["Enter", "open the picture's cells: then arrows move, + − 0 zoom", enterPicture],
  ["Escape", "leave the cell", () => (cell.value = null)],
  ["1", "first picture of the step", () => choosePicture(0)],
  ["2", "second picture", () => choosePicture(1)],
  ["3", "third picture", () => choosePicture(2)],
  ["s", "bend of the colour scale", () => (bend.value = nextBend(bend.peek() || "sym"))],
  [",", "generated token before", () => scrubBy(-1)],
  [".", "next generated token", () => scrubBy(1)],
  ["y", "copy the Python of this cell or run", copyPython],
  ["/", "edit the prompt", () => focus("#prompt")],
  ["a", "edit the address", () => focus("#address")],
  ["t", "light or dark", switchTheme],
  ["Ctrl+k", "find a step", openPalette],
  ["?", "these keys", openHelp],
];
export const GO = Object.fromEntries(ROOMS.map(([name]) => [{ map: "m", walk: "w", heads: "h", lens: "l",
  parts: "c", generate: "g", try: "e", compare: "b" }[name], name]));

/** @param {string} selector */
function focus(selector) {
  const found = /** @type {HTMLInputElement | null} */ (document.querySelector(selector));
  found?.focus();
  found?.select?.();
}

function enterPicture() {
  /** @type {HTMLElement | null} */ (document.querySelector("main canvas.grid"))?.focus();
}

function copyPython() {
  const button = document.querySelector(".microscope button.copy, .compare h2 button.copy") ?? document.querySelector(".readings h3 button.copy");
  /** @type {HTMLElement | null} */ (button)?.click();
}

/** @param {number} index */
function choosePicture(index) {
  const one = step.peek();
  const name = one && picturesOf(one)[index];
  if (name && name !== shownPicture.peek()) picture.value = name;
}

export function followKeys() {
  let goes = false; // g was pressed: the next letter is a room
  addEventListener("keydown", (event) => {
    const at = /** @type {HTMLElement} */ (event.target);
    if (event.ctrlKey && event.key === "k") {
      event.preventDefault();
      openPalette();
      return;
    }
    if (event.ctrlKey || event.metaKey || event.altKey || at.closest("input, textarea, select, dialog")) return;
    if (event.key === "Enter" && at.closest("button, a, [tabindex]") && at !== document.body) return;
    const went = goes;
    goes = event.key === "g" && !went;
    if (went && event.key in GO) {
      batch(() => (room.value = /** @type {any} */ (GO[event.key])));
    } else if (!goes) {
      const found = KEYS.find(([key]) => key === event.key);
      if (!found) return;
      found[2]();
    }
    event.preventDefault();
  });
}
