// The page inside a notebook: no server, requests go to the kernel through the frame around the page.

/** @type {Map<number, (answer: Response) => void>} */
const waiting = new Map();
let asked = 0;

const told = () => document.getElementById("bridge");

export function isBridged() {
  return told() !== null;
}

/** Where the notebook left the page. */
export function bridgedHash() {
  return /** @type {string} */ (JSON.parse(told()?.textContent || '""'));
}

/** Tell the notebook where the page is. @param {string} hash */
export function tellPlace(hash) {
  parent.postMessage({ pellucid: "place", hash }, "*");
}

/**
 * As fetch does, by messages.
 * @param {string} path
 * @param {RequestInit} options
 * @returns {Promise<Response>}
 */
export function askKernel(path, options) {
  const id = ++asked;
  return new Promise((resolve, reject) => {
    waiting.set(id, resolve);
    options.signal?.addEventListener("abort", () => {
      waiting.delete(id);
      parent.postMessage({ pellucid: "stop", id }, "*");
      reject(new DOMException("no longer wanted", "AbortError"));
    });
    parent.postMessage({ pellucid: "ask", id, path, method: options.method ?? "GET", body: options.body ?? "" }, "*");
  });
}

addEventListener("message", ({ source, data }) => {
  if (source !== parent || data?.pellucid !== "answer") return;
  waiting.get(data.id)?.(new Response(data.body, { status: data.status, headers: data.headers }));
  waiting.delete(data.id);
});
