// Tokens by how they were made: the colours, the words, the counts.

import { Paper } from "/assets/code.js";
import { folded, h, num, table } from "/assets/dom.js";
import { acceptLen } from "/assets/journal.js";

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

/**
 * A token, or a part of it, as nodes: the blanks before it stay unmarked, so that words stand apart. `begins`: the part is
 * the token's first; one of blanks alone has a mark there.
 */
function marked(token, text, begins = true) {
  const known = ORIGINS[token.origin];
  const word = text.trimStart();
  if (!word && !(begins && !token.text.trim())) return [text];
  const blanks = word ? text.slice(0, text.length - word.length) : "";
  const dataset = known ? { origin: token.origin, tip: `${known[0]}: ${known[1]} · id ${token.id}` } : {};
  return [blanks, h("span", { class: `tok ${known ? token.origin : ""}${word ? "" : " blank"}`, dataset }, word || text)].filter((part) => part !== "");
}

/** Text without tokens. */
const plain = (text) => [text];

/** False for a token that has only a part of a character's bytes. */
const whole = (token) => !token.text.includes("\uFFFD");

/**
 * The part of the text that each token stands for, and where the last one ends: `{ parts, end }`. Tokens may share a
 * character; it then goes to the first of them. Null if the text does not begin with the tokens.
 */
function pieces(tokens, text) {
  const parts = [];
  let end = 0;
  for (let i = 0; i < tokens.length; ) {
    if (whole(tokens[i])) {
      if (!text.startsWith(tokens[i].text, end)) return null;
      end += tokens[i].text.length;
      parts.push(tokens[i++].text);
      continue;
    }
    let next = i + 1;
    while (next < tokens.length && !(tokens[next].text && whole(tokens[next]))) next++;
    const until = next < tokens.length ? text.indexOf(tokens[next].text, end + 1) : text.length;
    if (until < 0) return null;
    parts.push(text.slice(end, until), ...Array(next - i - 1).fill(""));
    end = until;
    i = next;
  }
  return { parts, end };
}

/** An answer that grows token by token. */
export class Answer {
  constructor() {
    this.text = "";
    this.tokens = [];
    this.counts = { draft: 0, recovered: 0, bonus: 0, plain: 0 };
    this.node = h("div", { class: "answer" });
    this.paper = new Paper(this.node);
    // Tokens that are not shown yet, and how much of the text is.
    this.pending = [];
    this.painted = 0;
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

  /** Shows the tokens whose text is known; at the end of the answer it is known of all. */
  paint(atEnd = false) {
    this.frame = null;
    if (!this.tokens.length) {
      this.paper.write(this.text.slice(this.painted), plain);
      this.painted = this.text.length;
      return;
    }
    let ready = this.pending.length;
    while (!atEnd && ready && !whole(this.pending[ready - 1])) ready--;
    const tokens = this.pending.slice(0, ready);
    const fit = pieces(tokens, this.text.slice(this.painted));
    if (!fit) return;
    tokens.forEach((token, i) => this.paper.write(fit.parts[i], (text, begins) => marked(token, text, begins)));
    this.painted += fit.end;
    this.pending.splice(0, ready);
  }

  /** Draws what is left. False if tokens and text differ: then the text is shown without colours. */
  finish() {
    if (this.frame !== null) cancelAnimationFrame(this.frame);
    this.paint(true);
    this.paper.end();
    const matched = this.node.textContent === this.text;
    if (!matched) {
      this.paper = new Paper(this.node);
      this.paper.write(this.text, plain);
      this.paper.end();
    }
    return matched;
  }

  /** Committed tokens per verify step so far; null before the first. */
  acceptLen() {
    return acceptLen(this.tokens);
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
