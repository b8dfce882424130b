// The start of the page: models, the place in the URL, the rooms.

import { effect, scope } from "./signals.js";
import { html } from "./html.js";
import { get } from "./data/api.js";
import { bridgedHash, isBridged } from "./data/bridge.js";
import { followServer, followUrl, models, open, report, room } from "./state.js";
import { followTheme } from "./theme.js";
import { followKeys, KEYS } from "./keys.js";
import { askForKey, listKeys } from "./views/dialogs.js";
import { masthead } from "./views/masthead.js";
import { ledgerList } from "./views/ledger.js";
import { stage } from "./views/stage.js";
import { microscope } from "./views/microscope.js";
import { readings } from "./views/readings.js";
import { mapRoom } from "./views/map_room.js";
import { headsRoom } from "./views/heads_room.js";
import { lensRoom } from "./views/lens_room.js";
import { partsRoom } from "./views/parts_room.js";
import { generateRoom } from "./views/generate_room.js";
import { tryRoom } from "./views/try_room.js";
import { compareRoom } from "./views/compare_room.js";

function walkRoom() {
  return html`<section class="room walk"><nav class="rail" aria-label="ledger">${ledgerList()}</nav>${stage()}
    <aside class="reading">${microscope()}${readings()}</aside></section>`;
}

/** @type {Record<import("./state.js").Room, () => Node>} */
const MADE = { map: mapRoom, walk: walkRoom, heads: headsRoom, lens: lensRoom, parts: partsRoom, generate: generateRoom, try: tryRoom, compare: compareRoom };

function show() {
  const main = html`<main></main>`;
  document.body.append(masthead(), main);
  effect(() => {
    const make = MADE[room.value];
    main.dataset.room = room.value;
    return scope(() => main.replaceChildren(make()));
  });
}

async function start() {
  followTheme();
  listKeys(() => KEYS.map(([key, what]) => [key, what]));
  scope(show);
  followKeys();
  askForKey();
  try {
    models.value = (await get("/api/models")).models;
    await open(isBridged() ? bridgedHash() : location.hash);
    followUrl();
    followServer();
  } catch (error) {
    report(error, () => location.reload());
  }
  document.body.dataset.ready = "yes";
}

start();
