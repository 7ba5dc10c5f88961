// Tokens by how they were made: the colours, the words, the counts.

import { folded, h, num, table } from "/assets/dom.js";

/** Origins in the order of the legend: name and meaning. */
export const ORIGINS = {
  draft: ["drafted", "guessed by the draft, accepted by the target"],
  recovered: ["corrected", "the guess was wrong, the target put its own"],
  bonus: ["bonus", "all guesses were right, the target added one"],
  plain: ["plain", "decoded by the target alone"],
};

/** The legend, with a sample of each mark. */
export function legend() {
  return h("ul", { class: "legend", ariaLabel: "How tokens are marked" }, Object.entries(ORIGINS).map(([origin, [name, sentence]]) =>
    h("li", {}, h("span", { class: `tok ${origin}`, dataset: { tip: sentence } }, name), h("span", { class: "meaning" }, sentence))));
}

/** A token as nodes: the blanks before it stay unmarked, so that words stand apart. */
function marked(token, text) {
  if (!text) return [];
  const known = ORIGINS[token.origin];
  const word = text.trimStart();
  const blanks = word ? text.slice(0, text.length - word.length) : "";
  const dataset = known ? { origin: token.origin, tip: `${known[0]}: ${known[1]} · id ${token.id}` } : {};
  return [blanks, h("span", { class: `tok ${known ? token.origin : ""}`, dataset }, word || text)].filter((part) => part !== "");
}

/**
 * The part of the text that each token stands for. Tokens may share a character (its bytes); it then goes to the first of
 * them. Null if tokens and text do not fit.
 */
function pieces(tokens, text) {
  const out = [];
  for (let i = 0, at = 0; ; ) {
    if (i === tokens.length) return at === text.length ? out : null;
    const whole = (token) => !token.text.includes("\uFFFD");
    if (whole(tokens[i]) && text.startsWith(tokens[i].text, at)) {
      at += tokens[i].text.length;
      out.push(tokens[i++].text);
      continue;
    }
    if (whole(tokens[i])) return null;
    let next = i + 1;
    while (next < tokens.length && !(tokens[next].text && whole(tokens[next]))) next++;
    const end = next < tokens.length ? text.indexOf(tokens[next].text, at) : text.length;
    if (end < 0) return null;
    out.push(text.slice(at, end), ...Array(next - i - 1).fill(""));
    at = end;
    i = next;
  }
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
    for (const token of this.pending) this.node.append(...marked(token, token.text));
    this.pending = [];
    if (!this.tokens.length) this.node.textContent = this.text;
  }

  /** Draws what is left. False if tokens and text differ: then the text is shown without colours. */
  finish() {
    if (this.frame !== null) cancelAnimationFrame(this.frame);
    this.paint();
    if (!this.tokens.length || this.node.textContent === this.text) return true;
    const parts = pieces(this.tokens, this.text);
    if (parts) this.node.replaceChildren(...this.tokens.flatMap((token, i) => marked(token, parts[i])));
    else this.node.textContent = this.text;
    return parts !== null;
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
