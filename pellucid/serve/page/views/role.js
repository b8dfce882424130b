// What a tensor is to the model: its colour everywhere on the page, its title, its scale.

import { head, headOf } from "../state.js";

/** @param {string} leaf */
export function roleOf(leaf) {
  if (/^attn\.q/.test(leaf)) return "q";
  if (/^attn\.k/.test(leaf)) return "k";
  if (/^attn\.v/.test(leaf)) return "v";
  if (/^attn\.(z|out)$|^attn_out/.test(leaf)) return "v";
  if (/^attn\./.test(leaf) || /mask$/.test(leaf)) return "attn";
  if (/^mlp/.test(leaf)) return "mlp";
  if (/rope|position|growth/.test(leaf)) return "place";
  if (/logits/.test(leaf)) return "logits";
  return "resid";
}

/**
 * The title of a step, with the heads in it; the sentence where it has none.
 * @param {import("../state.js").Step} one
 * @param {boolean} [brief] up to its colon
 */
export function titleOf(one, brief = false) {
  const text = (one.title || one.sentence.replace(/\.$/, "")).replace("{head}", String(head.value))
    .replace(brief ? " of key/value head {kv_head}" : "{kv_head}", brief ? "" : String(headOf(one)));
  return brief ? text.split(/: | \(/)[0] : text;
}

/** A point of the residual stream in words. @param {string} name */
export function pointName(name) {
  const found = /^layers\.(\d+)\.resid_(pre|mid|post)$/.exec(name);
  if (!found) return name;
  const at = Number(found[1]);
  if (found[2] === "mid") return `inside ${at}`;
  if (found[2] === "post") return `after ${at}`;
  return at ? `after ${at - 1}` : "embedding";
}

/** Which scale of colours suits a step. @param {import("../state.js").Step} step */
export function paletteOf(step) {
  if (/pattern$/.test(step.id)) return "share";
  if (/mask$/.test(step.id)) return "size";
  return "signed";
}
