// Tokens by how they were made: the colours, the words, the counts.

import { folded, h, num, table } from "/assets/dom.js";

/** Origins in the order of the legend: name, sentence, one letter for the list. */
export const ORIGINS = {
  draft: ["drafted", "Drafted and accepted: the draft guessed it, the target agreed", "D"],
  recovered: ["corrected", "Corrected: the draft guessed wrong, the target put its own token", "C"],
  bonus: ["bonus", "Bonus: every guess was right, the target added one more", "B"],
  plain: ["plain", "Plain: decoded by the target alone", "P"],
};

/** The legend, with a sample of each mark. */
export function legend() {
  return h("ul", { class: "legend", ariaLabel: "How tokens are marked" }, Object.entries(ORIGINS).map(([origin, [name, sentence]]) =>
    h("li", { dataset: { tip: sentence } }, h("span", { class: `tok ${origin}` }, name), h("span", { class: "sr" }, `: ${sentence}`))));
}

/** An answer that grows token by token. */
export class Answer {
  constructor() {
    this.text = "";
    this.tokens = [];
    this.counts = { draft: 0, recovered: 0, bonus: 0, plain: 0 };
    this.node = h("div", { class: "answer" });
    this.pending = [];
    this.frame = null;
    this.firstAt = null;
    this.lastAt = null;
  }

  /** Takes in one event of the stream. */
  add({ text, tokens }) {
    if (tokens.length || text) {
      this.lastAt = performance.now();
      this.firstAt ??= this.lastAt;
    }
    this.text += text;
    for (const token of tokens) {
      this.tokens.push(token);
      if (token.origin in this.counts) this.counts[token.origin] += 1;
      this.pending.push(token);
    }
    // One layout per frame, however many events arrive.
    this.frame ??= requestAnimationFrame(() => this.paint());
  }

  paint() {
    this.frame = null;
    for (const token of this.pending) {
      if (!token.text) continue;
      const known = ORIGINS[token.origin];
      this.node.append(h("span", { class: `tok ${known ? token.origin : ""}`, dataset: known ? { origin: token.origin, id: token.id, tip: `${known[0]} · id ${token.id}` } : {} }, token.text));
    }
    this.pending = [];
    if (!this.tokens.length) this.node.textContent = this.text;
  }

  /** Draws what is left. False if tokens and text differ: then the text is shown without colours. */
  finish() {
    if (this.frame !== null) cancelAnimationFrame(this.frame);
    this.paint();
    if (!this.tokens.length || this.tokens.map((token) => token.text).join("") === this.text) return true;
    this.node.textContent = this.text;
    return false;
  }

  /** Committed tokens per verify step so far; null before the first. A step ends with a corrected or a bonus token. */
  acceptLen() {
    const { draft, recovered, bonus } = this.counts;
    const steps = recovered + bonus;
    return steps ? (draft + steps) / steps : null;
  }

  /** Tokens per second since the first one, by this browser's clock; null with fewer than two. */
  rate() {
    const ms = this.lastAt - this.firstAt;
    return this.tokens.length > 1 && ms > 0 ? ((this.tokens.length - 1) / ms) * 1000 : null;
  }

  /** The counts as a sentence. */
  sentence() {
    const parts = Object.entries(this.counts).filter(([, n]) => n).map(([origin, n]) => `${num(n)} ${ORIGINS[origin][0]}`);
    return `${num(this.tokens.length)} tokens${parts.length ? `: ${parts.join(", ")}` : ""}`;
  }

  /** The shares as one bar, for those who look. */
  shares() {
    const total = this.tokens.length || 1;
    return h("div", { class: "shares", ariaHidden: "true" }, Object.entries(this.counts).filter(([, n]) => n).map(([origin, n]) => {
      const part = h("span", { class: origin });
      part.style.flexGrow = n / total;
      return part;
    }));
  }

  /** Every token in a table, folded. */
  list() {
    return folded("Tokens one by one", () => table(["#", "token", "id", "made"],
      this.tokens.map((token, i) => [String(i + 1), h("code", {}, JSON.stringify(token.text)), String(token.id), ORIGINS[token.origin]?.[0] ?? token.origin]), ["r", "", "r"]));
  }
}
