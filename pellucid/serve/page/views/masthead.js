// The top of the page: where one is (an editable address), the rooms, the prompt, what is going on.

import { effect, signal } from "../signals.js";
import { html } from "../html.js";
import { connection } from "../data/api.js";
import { address, busy, goToAddress, live, model, modelName, models, prompt, report, room, ROOMS, run, startRun, trouble } from "../state.js";
import { switchTheme, theme } from "../theme.js";
import { chips } from "./chips.js";
import { duration } from "../data/numbers.js";
import { copyButton } from "./copy.js";
import { openHelp } from "./dialogs.js";

export function masthead() {
  effect(() => { // on a phone the tabs scroll
    room.value;
    requestAnimationFrame(() => document.querySelector(".rooms [aria-selected='true']")?.scrollIntoView({ block: "nearest", inline: "nearest" }));
  });
  const title = () => ROOMS.find(([name]) => name === room.value)?.[1] ?? "";
  return html`<header class="masthead"><h1 class="spoken">Pellucid: ${title}</h1><div class="top">
    <a class="brand" href="#" @click=${(/** @type {Event} */ event) => (event.preventDefault(), (room.value = "map"))}
      title="the map"><svg viewBox="0 0 24 24" width="22" height="22" aria-hidden="true"><circle cx="10" cy="10" r="6.5"></circle>
      <path d="M15 15l6 6M10 6.5v7M6.5 10h7"></path></svg><span>pellucid</span></a>
    <nav class="tabs rooms" role="tablist" aria-label="views">${ROOMS.map(([name, title]) => html`<button role="tab"
      aria-selected=${() => String(room.value === name)} @click=${() => (room.value = name)}>${title}</button>`)}</nav>
    <span class="spacer"></span>${breadcrumb()}
    <button class="icon" title="light or dark (t)" aria-label="light or dark" @click=${switchTheme}>${() => (theme.value === "dark" ? "☀" : "☾")}</button>
    <button class="icon" title="keys (?)" aria-label="keys" @click=${openHelp}>?</button></div>
    ${promptLine()}${chips()}${notices()}
    <div class="spoken" aria-live="polite" id="live">${live}</div></header>`;
}

function breadcrumb() {
  const input = html`<input id="address" aria-label="address" spellcheck="false" autocomplete="off"
    title="the address of what is shown (a); edit it and press Enter">`;
  effect(() => {
    input.value = address.value;
  });
  onEnter(input, () => {
    try {
      goToAddress(input.value);
      input.blur();
    } catch (error) {
      report(error);
    }
  });
  return html`<span class="breadcrumb">${input}${copyButton(() => location.href, "copy link")}</span>`;
}

/** Enter in a field acts, Escape leaves it. @param {HTMLElement} field @param {() => void} act */
function onEnter(field, act) {
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") field.blur();
    if (event.key !== "Enter" || event.shiftKey) return;
    event.preventDefault();
    act();
  });
}

function runPrompt() {
  const name = modelName.peek();
  startRun({ model: name, prompt: prompt.peek() });
}

function promptLine() {
  const line = html`<div class="promptline">
    <select aria-label="model" .value=${modelName} @change=${(/** @type {any} */ event) => {
      modelName.value = event.target.value;
      startRun({ model: event.target.value, prompt: prompt.peek() || model.peek()?.prompt });
    }}>${() => models.value.map((one) => html`<option value=${one.name} selected=${one.name === modelName.value}>${one.name}</option>`)}</select>
    <textarea id="prompt" rows="1" aria-label="prompt" title="Enter runs it, Shift+Enter begins a line" spellcheck="false"
      autocomplete="off" .value=${prompt} @input=${(/** @type {any} */ event) => (prompt.value = event.target.value)}></textarea>
    ${() => (busy.value ? html`<button class="primary" @click=${() => busy.peek()?.stop()}>Stop</button>`
      : html`<button class="primary" title="run (Enter)" @click=${runPrompt}>Run</button>`)}
    <span class="facts">${() => said()}</span></div>`;
  onEnter(line.querySelector("#prompt"), runPrompt);
  return line;
}

function said() {
  const now = run.value;
  if (!now) return "";
  return `${now.ids.length} tokens · ${duration(now.seconds)}${now.edits?.length ? ` · ${now.edits.length} change${now.edits.length > 1 ? "s" : ""}` : ""}`;
}

function notices() {
  const waited = signal(0);
  effect(() => {
    const now = busy.value;
    waited.value = 0;
    if (!now) return;
    const timer = setInterval(() => (waited.value = Math.round((performance.now() - now.since) / 1000)), 500);
    return () => clearInterval(timer);
  });
  return html`<div class="notices" role="status">
    ${() => (connection.value === "gone" ? html`<p class="notice bad"><b>The server does not answer.</b> What is shown stays;
      the page goes on by itself when <code>pellucid serve</code> runs again.</p>` : "")}
    ${() => (busy.value && waited.value >= 1 ? html`<p class="notice">${busy.value.what}… ${waited} s
      <button @click=${() => busy.peek()?.stop()}>Stop</button></p>` : "")}
    ${() => (trouble.value && connection.value === "ok" ? html`<p class="notice bad">${trouble.value.said}
      ${trouble.value.again ? html`<button @click=${trouble.value.again}>Try again</button>` : ""}
      <button class="quiet" aria-label="close" @click=${() => (trouble.value = null)}>×</button></p>` : "")}</div>`;
}
