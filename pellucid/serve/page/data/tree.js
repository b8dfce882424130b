// Branches of generated text: each begins where another was left, at a token chosen instead.

import { signal } from "../signals.js";

/**
 * @typedef {{id: number, text: string, probability: number}} Choice
 * @typedef {Choice & {alternatives: Choice[], seconds: number, cached: number}} Written
 * @typedef {{name: number, from: number | null, at: number, tokens: Written[], finish: string}} Branch
 *   at: how many tokens it shares with the branch it left
 */

export class Tree {
  constructor() {
    this.branches = signal(/** @type {Branch[]} */ ([]));
    this.shown = signal(0);
  }

  clear() {
    this.branches.value = [];
    this.shown.value = 0;
  }

  /** Begin a branch that keeps `at` tokens of another. @param {number | null} from @param {number} at */
  begin(from, at) {
    const before = from === null ? [] : this.branches.peek()[from].tokens.slice(0, at);
    /** @type {Branch} */
    const made = { name: this.branches.peek().length, from, at, tokens: before, finish: "" };
    this.branches.value = [...this.branches.peek(), made];
    this.shown.value = made.name;
    return made.name;
  }

  /** @param {number} name @param {Written} token */
  add(name, token) {
    this.change(name, (one) => ({ ...one, tokens: [...one.tokens, token] }));
  }

  /** @param {number} name @param {string} finish */
  end(name, finish) {
    this.change(name, (one) => ({ ...one, finish }));
  }

  /** @param {number} name @param {(one: Branch) => Branch} how */
  change(name, how) {
    this.branches.value = this.branches.peek().map((one) => (one.name === name ? how(one) : one));
  }

  get branch() {
    return this.branches.value[this.shown.value] ?? null;
  }

  /** How many branches a branch hangs below. @param {Branch} one @returns {number} */
  depth(one) {
    return one.from === null ? 0 : 1 + this.depth(this.branches.peek()[one.from]);
  }
}
