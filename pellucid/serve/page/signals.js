// Values that know who reads them: when one changes, what was computed from it is computed again.
//
// A signal holds a value. A computed value is worked out when it is read and its sources changed.
// An effect runs at once and again whenever something it read changes; what was made inside an
// effect (effects, cleanups) ends before it runs again.

/**
 * @template T
 * @typedef {{value: T, peek: () => T}} Signal
 */
/**
 * @template T
 * @typedef {{readonly value: T, peek: () => T}} Computed
 */
/** @typedef {{version: number, readers: Set<Reader>, refresh: () => void}} Source */
/** @typedef {{sources: Map<Source, number>, stale: () => void}} Reader */
/** @typedef {{children: (() => void)[]}} Owner */

/** @type {Reader | null} */
let reader = null;
/** @type {Owner | null} */
let owner = null;
let batches = 0;
let flushing = false;
/** @type {Set<{run: () => void}>} */
const waiting = new Set();

/** @param {Source} source */
function noteRead(source) {
  if (!reader) return;
  reader.sources.set(source, source.version);
  source.readers.add(reader);
}

/** @param {Reader} one */
function forgetSources(one) {
  for (const source of one.sources.keys()) source.readers.delete(one);
  one.sources.clear();
}

/** Whether a source has a newer value than the reader saw. @param {Reader} one */
function isOutdated(one) {
  for (const [source, seen] of one.sources) {
    source.refresh();
    if (source.version !== seen) return true;
  }
  return false;
}

function flush() {
  if (flushing) return; // the loop below comes round again
  flushing = true;
  try {
    for (let rounds = 0; waiting.size; rounds++) {
      if (rounds > 1000) throw new Error("signals: effects keep changing what they read");
      const due = [...waiting];
      waiting.clear();
      for (const effect of due) effect.run();
    }
  } finally {
    flushing = false;
    waiting.clear();
  }
}

/**
 * Run a function; effects wait for its end.
 * @template T
 * @param {() => T} change
 * @returns {T}
 */
export function batch(change) {
  batches++;
  try {
    return change();
  } finally {
    if (--batches === 0) flush();
  }
}

/**
 * A value that can be set.
 * @template T
 * @param {T} value
 * @returns {Signal<T>}
 */
export function signal(value) {
  /** @type {Source} */
  const source = { version: 0, readers: new Set(), refresh() {} };
  return {
    get value() {
      noteRead(source);
      return value;
    },
    set value(next) {
      if (Object.is(next, value)) return;
      value = next;
      source.version++;
      batch(() => [...source.readers].forEach((one) => one.stale()));
    },
    peek: () => value,
  };
}

/**
 * A value worked out from others; equal results stop the change here.
 * @template T
 * @param {() => T} work
 * @returns {Computed<T>}
 */
export function computed(work) {
  /** @type {T} */
  let value;
  let dirty = true;
  /** @type {Reader} */
  const self = { sources: new Map(), stale };
  /** @type {Source} */
  const source = { version: 0, readers: new Set(), refresh };
  function stale() {
    if (dirty) return;
    dirty = true;
    [...source.readers].forEach((one) => one.stale());
  }
  function refresh() {
    if (!dirty) return;
    dirty = false;
    if (source.version && !isOutdated(self)) return;
    forgetSources(self);
    const next = as(self, null, work);
    if (source.version && Object.is(next, value)) return;
    value = next;
    source.version++;
  }
  return {
    get value() {
      refresh();
      noteRead(source);
      return value;
    },
    peek() {
      refresh();
      return value;
    },
  };
}

/**
 * Run now and after every change of what was read; returns how to stop. A function that `work`
 * returns is called before the next run and at the end.
 * @param {() => void | (() => void)} work
 * @returns {() => void}
 */
export function effect(work) {
  let live = true;
  /** @type {Owner} */
  const own = { children: [] };
  /** @type {Reader} */
  const self = { sources: new Map(), stale: () => void waiting.add(task) };
  const task = { run: () => live && isOutdated(self) && execute() };
  function clear() {
    forgetSources(self);
    endChildren(own);
  }
  function execute() {
    clear();
    const cleanup = batch(() => as(self, own, work));
    if (cleanup) own.children.push(cleanup);
  }
  function stop() {
    live = false;
    waiting.delete(task);
    clear();
  }
  owner?.children.push(stop);
  execute();
  return stop;
}

/**
 * Run `work` and return how to end every effect that it made.
 * @param {() => void} work
 * @returns {() => void}
 */
export function scope(work) {
  /** @type {Owner} */
  const own = { children: [] };
  as(null, own, work);
  return () => endChildren(own);
}

/** Call `end` when the effect or scope around this call ends. @param {() => void} end */
export function onEnd(end) {
  owner?.children.push(end);
}

/**
 * Read without becoming a reader.
 * @template T
 * @param {() => T} work
 * @returns {T}
 */
export function untracked(work) {
  return as(null, owner, work);
}

/** @param {Owner} one */
function endChildren(one) {
  one.children.splice(0).reverse().forEach((end) => end());
}

/**
 * @template T
 * @param {Reader | null} nextReader
 * @param {Owner | null} nextOwner
 * @param {() => T} work
 * @returns {T}
 */
function as(nextReader, nextOwner, work) {
  const before = { reader, owner };
  reader = nextReader;
  owner = nextOwner;
  try {
    return work();
  } finally {
    reader = before.reader;
    owner = before.owner;
  }
}
