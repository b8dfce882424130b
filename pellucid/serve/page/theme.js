// Light or dark, and the colours of the style sheet for those who draw.

import { effect, signal } from "./signals.js";

const system = matchMedia("(prefers-color-scheme: dark)");
const chosen = signal(localStorage.getItem("theme") ?? "system");
const systemDark = signal(system.matches);
system.addEventListener("change", () => (systemDark.value = system.matches));

export const theme = signal(/** @type {"light" | "dark"} */ ("light"));
export const stillness = matchMedia("(prefers-reduced-motion: reduce)");

/** @type {Map<string, string>} */
const inks = new Map();

/** A colour of the style sheet, such as "--accent". @param {string} name */
export function ink(name) {
  let known = inks.get(name);
  if (!known) {
    known = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
    inks.set(name, known);
  }
  return known;
}

export function followTheme() {
  effect(() => {
    const dark = chosen.value === "system" ? systemDark.value : chosen.value === "dark";
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    inks.clear();
    theme.value = dark ? "dark" : "light";
  });
}

export function switchTheme() {
  chosen.value = theme.peek() === "dark" ? "light" : "dark";
  localStorage.setItem("theme", chosen.peek());
}
