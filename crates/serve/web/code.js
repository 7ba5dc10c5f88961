// Text that grows, with its code set as code: fenced blocks and what stands between backticks. Every letter stays, marks of
// Markdown included, as a text node of its own: what is on the page is what the model wrote, token by token.

import { announce, h } from "/assets/dom.js";

const FENCE = /^\s*(`{3,}|~{3,})[^`\n]*\n?$/;
/** What may still become the line that begins a block. */
const MAYBE_FENCE = /^\s*(`*|~*|`{3,}[^`\n]*|~{3,}[^\n]*)$/;
const TICKS = /`+/g;

/**
 * The parts of a line: `{ from, to, ticks }`, `ticks` being the length of the marks around code, 0 for prose. Backticks
 * that nothing closes are prose, unless the line goes on (`open`): then what follows them is taken for code, provisionally.
 */
export function parts(line, open) {
  const found = [];
  const runs = [...line.matchAll(TICKS)].map((run) => ({ at: run.index, size: run[0].length }));
  let from = 0;
  for (let i = 0; i < runs.length; ) {
    const run = runs[i];
    const close = runs.findIndex(({ size }, k) => k > i && size === run.size);
    if (close < 0 && !open) {
      i++;
      continue;
    }
    if (run.at > from) found.push({ from, to: run.at, ticks: 0 });
    const to = close < 0 ? line.length : runs[close].at + run.size;
    found.push({ from: run.at, to, ticks: run.size, closed: close >= 0 });
    from = to;
    i = close < 0 ? runs.length : close + 1;
  }
  if (from < line.length) found.push({ from, to: line.length, ticks: 0 });
  return found;
}

/** See above. `write(text, mark)` for each piece, `mark(part)` making the nodes of a part of it; `end()` once. */
export class Paper {
  constructor(node) {
    this.node = node;
    node.replaceChildren();
    // Pieces of the present line, and how much of them is on the page for good.
    this.line = [];
    this.settled = 0;
    this.provisional = [];
    // The block that is open: where its lines go, and the mark that closes it.
    this.block = null;
  }

  write(text, mark) {
    this.clear();
    for (const piece of text.split(/(?<=\n)/)) {
      this.line.push({ text: piece, mark });
      if (piece.endsWith("\n")) this.close();
    }
    this.show(true);
  }

  /** Nothing follows. */
  end() {
    this.clear();
    if (this.line.length) this.close();
  }

  clear() {
    for (const node of this.provisional) node.remove();
    this.provisional = [];
  }

  text() {
    return this.line.map((piece) => piece.text).join("");
  }

  /** Nodes of a stretch of the line. */
  nodes(from, to) {
    const out = [];
    let at = 0;
    for (const { text, mark } of this.line) {
      const [a, b] = [Math.max(from - at, 0), Math.min(to - at, text.length)];
      if (b > a) out.push(...mark(text.slice(a, b), a === 0));
      at += text.length;
    }
    return out;
  }

  /** The line is whole. */
  close() {
    const line = this.text();
    const fence = line.match(FENCE)?.[1];
    if (this.block) {
      const ends = fence && line.trim() === fence && fence[0] === this.block.fence[0] && fence.length >= this.block.fence.length;
      if (ends) {
        this.block.box.append(h("div", { class: "fence" }, this.nodes(0, line.length)));
        this.block = null;
      } else {
        this.block.code.append(...this.nodes(this.settled, line.length));
      }
    } else if (fence) {
      this.block = block(fence, this.nodes(0, line.length));
      this.node.append(this.block.box);
    } else {
      this.append(parts(line.slice(this.settled), false), this.node);
    }
    this.line = [];
    this.settled = 0;
  }

  append(found, place) {
    for (const { from, to, ticks } of found) {
      const [a, b] = [this.settled + from, this.settled + to];
      if (!ticks) {
        place.append(...this.nodes(a, b));
        continue;
      }
      const mark = (nodes) => h("span", { class: "tick" }, nodes);
      const inner = Math.max(a + ticks, b - ticks);
      place.append(h("code", {}, mark(this.nodes(a, a + ticks)), this.nodes(a + ticks, inner), inner < b ? mark(this.nodes(inner, b)) : null));
    }
  }

  /** The line as far as it is known: what cannot change any more for good, the rest until the next piece. */
  show() {
    const line = this.text();
    if (!line) return;
    const undecided = this.settled === 0 && MAYBE_FENCE.test(line);
    const place = this.block ? this.block.code : this.node;
    if (this.block) {
      if (undecided) this.later(this.nodes(0, line.length), place);
      else {
        place.append(...this.nodes(this.settled, line.length));
        this.settled = line.length;
      }
      return;
    }
    if (undecided) {
      const fence = line.match(FENCE)?.[1];
      return this.later(fence ? [block(fence, this.nodes(0, line.length)).box] : this.nodes(0, line.length), place);
    }
    const rest = line.slice(this.settled);
    const found = parts(rest, true);
    // Code at the end may go on: the backticks that close it may be more, or may never come.
    const last = found.at(-1);
    const sure = last?.ticks ? found.slice(0, -1) : found;
    this.append(sure, place);
    if (last?.ticks) {
      const box = document.createDocumentFragment();
      this.append([last.closed ? last : { ...last, to: rest.length }], box);
      this.later([...box.childNodes], place);
    }
    this.settled += sure.at(-1)?.to ?? 0;
  }

  later(nodes, place) {
    // Text nodes, too, so that they can be taken away again.
    this.provisional = nodes.map((node) => (node instanceof Node ? node : document.createTextNode(node)));
    place.append(...this.provisional);
  }
}

/** A block of code below the line that began it. */
function block(fence, head) {
  const code = h("code");
  const copy = h("button", { type: "button", class: "copy", ariaLabel: "Copy the code", dataset: { tip: "Copy" }, onclick: async () => {
    await navigator.clipboard.writeText(code.textContent);
    copy.dataset.tip = "Copied";
    announce("Copied");
  } });
  // Browsers give the clipboard to pages from this machine or by https alone.
  const box = h("div", { class: "code" }, h("div", { class: "fence" }, head), navigator.clipboard ? copy : null, h("pre", { tabIndex: 0 }, code));
  return { fence, box, code };
}
