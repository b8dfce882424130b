// The way to the server: JSON, bytes and streams. One recorded file can stand in for the server
// (see recorded.js), which is how a run is shared as a single page.

import { signal } from "../signals.js";
import { askKernel, isBridged } from "./bridge.js";
import { isRecording, recordedAnswer } from "./recorded.js";

/** Whether the server answers; `gone` keeps the last picture on the page and tries again. */
export const connection = signal(/** @type {"ok" | "gone"} */ ("ok"));
/** Set when the server asked for a key. */
export const keyNeeded = signal(false);

export class ApiError extends Error {
  /**
   * @param {string} message
   * @param {number} status
   */
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

let asking = 0;
/**
 * Count an answer that is awaited: the page shows a line meanwhile.
 * @template T
 * @param {Promise<T>} answer
 * @returns {Promise<T>}
 */
async function counted(answer) {
  document.body.dataset.asking = String(++asking);
  try {
    return await answer;
  } finally {
    // After what the answer brings, which may be further requests.
    setTimeout(() => (document.body.dataset.asking = String(--asking)));
  }
}

/**
 * @param {string} path
 * @param {RequestInit} [options]
 * @returns {Promise<Response>}
 */
async function ask(path, options = {}) {
  if (isRecording()) {
    const kept = recordedAnswer(path);
    if (kept) return kept;
    throw new ApiError("This page is a recording, without that part: open the model with pellucid serve.", 404);
  }
  let answer;
  try {
    answer = await (isBridged() ? askKernel(path, options) : fetch(path, { ...options, headers: withKey(options) }));
  } catch (error) {
    if (options.signal?.aborted) throw error;
    serverGone();
    throw new ApiError("the server does not answer", 0);
  }
  connection.value = "ok";
  if (answer.ok) return answer;
  if (answer.status === 401) keyNeeded.value = true;
  const said = await answer.json().catch(() => null);
  throw new ApiError(said?.error?.message ?? `${answer.status} ${answer.statusText}`, answer.status);
}

/** @param {RequestInit} options */
function withKey(options) {
  const headers = new Headers(options.headers);
  const key = sessionStorage.getItem("key");
  if (key) headers.set("Authorization", `Bearer ${key}`);
  return headers;
}

/** Ask for the server every two seconds until it is back. */
function serverGone() {
  if (connection.peek() === "gone") return;
  connection.value = "gone";
  const timer = setInterval(async () => {
    try {
      if ((await fetch("/health")).ok) connection.value = "ok";
    } catch {
      return; // still gone
    }
    if (connection.peek() === "ok") clearInterval(timer);
  }, 2000);
}

/**
 * @param {string} path
 * @param {AbortSignal} [signal]
 * @returns {Promise<any>}
 */
export function get(path, signal) {
  return counted(ask(path, { signal }).then((answer) => answer.json()));
}

/**
 * @param {string} path
 * @param {any} body
 * @param {AbortSignal} [signal]
 * @returns {Promise<any>}
 */
export function post(path, body, signal) {
  return counted(send(path, body, signal).then((answer) => answer.json()));
}

/**
 * @param {string} path
 * @param {any} body
 * @param {AbortSignal} [signal]
 */
function send(path, body, signal) {
  return ask(path, {
    method: "POST", body: JSON.stringify(body), signal,
    headers: { "Content-Type": "application/json" },
  });
}

/**
 * Bytes of a tensor with the headers that describe them.
 * @param {string} path
 * @param {AbortSignal} [signal]
 */
export function bytes(path, signal) {
  return counted(ask(path, { signal }).then(async (answer) =>
    ({ headers: answer.headers, buffer: await answer.arrayBuffer() })));
}

/**
 * Events of a stream, each a JSON object; an error inside it is thrown.
 * @param {string} path
 * @param {any} body
 * @param {AbortSignal} signal
 */
export async function* events(path, body, signal) {
  const answer = await send(path, body, signal);
  const reader = /** @type {ReadableStream<Uint8Array>} */ (answer.body).getReader();
  const decoder = new TextDecoder();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    text += decoder.decode(value, { stream: !done });
    for (let end = text.indexOf("\n\n"); end >= 0; end = text.indexOf("\n\n")) {
      const event = text.slice(0, end).split("\n").filter((line) => line.startsWith("data:"))
        .map((line) => line.slice(5).trim()).join("");
      text = text.slice(end + 2);
      if (!event || event === "[DONE]") continue;
      const read = JSON.parse(event);
      if (read.error) throw new ApiError(read.error.message, 500);
      yield read;
    }
    if (done) return;
  }
}
