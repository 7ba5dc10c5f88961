// Elements, numbers and dates. Text from outside only ever becomes a text node: nothing here parses HTML.

/** An element. `props`: `class`, `on*` handlers, `dataset`, DOM properties or attributes; children: nodes, text, arrays, null. */
export function h(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "class") node.className = value;
    else if (name === "dataset") Object.assign(node.dataset, value);
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name in node && name !== "list" && name !== "form") node[name] = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  append(node, children);
  return node;
}

/** An SVG element; every prop is an attribute. */
export function s(tag, props = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(props)) {
    if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  append(node, children);
  return node;
}

function append(node, children) {
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    node.append(child instanceof Node ? child : String(child));
  }
}

/** Says something to a screen reader. */
export function announce(text) {
  document.getElementById("announce").textContent = text;
}

/** A number with thousands separators and `digits` decimals; a dash for nothing. */
export function num(value, digits = 0) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  return value.toLocaleString("en-GB", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

/** A share as per cent. */
export const percent = (value, digits = 1) => (value === null || value === undefined ? "–" : `${num(value * 100, digits)}\u00a0%`);

/** Milliseconds in a unit that reads well. */
export function ms(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (value < 10) return `${num(value, 2)} ms`;
  return value < 1000 ? `${num(value)} ms` : `${num(value / 1000, 2)} s`;
}

/** Seconds as a rough span. */
export function span(seconds) {
  if (!Number.isFinite(seconds)) return "–";
  if (seconds < 90) return `${num(seconds)} s`;
  if (seconds < 5400) return `${num(seconds / 60)} min`;
  return seconds < 172800 ? `${num(seconds / 3600, 1)} h` : `${num(seconds / 86400)} days`;
}

/** Bytes in a decimal unit. */
export function bytes(value) {
  if (!Number.isFinite(value)) return "–";
  const units = ["B", "kB", "MB", "GB"];
  let i = 0;
  while (value >= 1000 && i < units.length - 1) (value /= 1000), i++;
  return `${num(value, value < 10 && i > 0 ? 1 : 0)} ${units[i]}`;
}

/** A date (seconds since 1970, or an ISO text) as day and time. */
export function day(when) {
  const date = typeof when === "number" ? new Date(when * 1000) : new Date(when);
  if (Number.isNaN(date.valueOf())) return "–";
  return date.toLocaleString("en-GB", { day: "numeric", month: "short", year: "numeric", hour: "2-digit", minute: "2-digit" });
}

/** `value [low, high]`. */
export function withInterval(value, interval, digits = 2, unit = "") {
  const range = interval ? ` [${num(interval[0], digits)}, ${num(interval[1], digits)}]` : "";
  return `${num(value, digits)}${unit}${range}`;
}

/** A table; `align` per column: "r" for numbers. `rows` hold nodes or text. */
export function table(head, rows, align = []) {
  const cell = (tag, content, i) => h(tag, { class: align[i] === "r" ? "r" : null, scope: tag === "th" ? "col" : null }, content);
  return h("div", { class: "scroll", tabIndex: 0, role: "group", ariaLabel: "Table" },
    h("table", {},
      h("thead", {}, h("tr", {}, head.map((c, i) => cell("th", c, i)))),
      h("tbody", {}, rows.map((row) => h("tr", {}, row.map((c, i) => cell("td", c, i)))))));
}

/** Terms and what they are: `[[term, content], …]`; entries without content are left out. */
export function facts(entries) {
  const shown = entries.filter(([, content]) => content !== null && content !== undefined && content !== "");
  return h("dl", { class: "facts" }, shown.map(([term, content]) => h("div", {}, h("dt", {}, term), h("dd", {}, content))));
}

/** A hash, shortened; the whole of it as its title. */
export const hash = (value) => (value ? h("code", { class: "hash", title: value }, `${value.slice(0, 12)}…`) : null);

/** A large figure with its unit and where it comes from. */
export function tile(label, value, note) {
  return h("div", { class: "tile" }, h("div", { class: "tile-label" }, label), h("div", { class: "tile-value" }, value),
    note ? h("div", { class: "tile-note" }, note) : null);
}

/** A folded part; `fill()` makes its content when it is opened first. */
export function folded(title, fill) {
  const box = h("details", { class: "fold" }, h("summary", {}, title));
  box.addEventListener("toggle", () => {
    if (box.open && box.children.length === 1) box.append(fill());
  });
  return box;
}

/** What stands in place of content that isn't there. */
export function empty(title, text, ...more) {
  return h("div", { class: "empty" }, h("h2", {}, title), h("p", {}, text), more);
}

/** Grey bars while something loads. */
export function loading(what) {
  return h("div", { class: "loading", role: "status" }, h("span", { class: "sr" }, `Loading ${what}`),
    h("div", { class: "bar w40" }), h("div", { class: "bar w90" }), h("div", { class: "bar w70" }));
}
