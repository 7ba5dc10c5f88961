// Curves that grow while one looks: lines over steps, with intervals where they were measured. Marks and dashes differ as
// well as colours; the pointer, or the arrow keys, read the values of a step.

import { announce, h, num, s } from "/assets/dom.js";
import { DASHES, SHAPES, decimals, mark, ticks } from "/assets/plot.js";

/** More points than this are a line without marks. */
const MARKED = 40;
const HEIGHT = 240;

/**
 * A figure with `set({ series, xMax })`. `series`: `{ name, points: [[x, y, [low, high] | null], …], bare }`, `bare`: marks
 * without a line; `xMax`: where the axis ends, if that is known before the curve is there. `format` writes a value, an
 * axis has `scale` times the values and `unit`; `from`: a value that the axis begins at or below.
 */
export function curve(title, note, { format, scale = 1, unit = "", from = null, xLabel = "step" }) {
  const slot = h("div", { class: "plot curve-plot" });
  const readout = h("p", { class: "readout" });
  const legend = h("ul", { class: "keys" });
  const noteNode = h("span", { class: "quiet" }, note);
  const node = h("figure", {}, h("figcaption", {}, h("strong", {}, title), noteNode), slot, readout, legend);
  let series = [];
  let xMax = null;
  let at = null;
  let xs = [];

  const value = (one, x) => one.points.findLast(([px]) => px === x);
  const words = ([, y, range]) => `${format(y)}${range ? ` [${format(range[0])}, ${format(range[1])}]` : ""}`;
  /** What the series say at a step; those without a value there are left out. */
  function said(x) {
    const known = series.map((one) => [one.name, value(one, x)]).filter(([, point]) => point);
    return `${xLabel} ${num(x)} · ${known.map(([name, point]) => `${series.length > 1 ? `${name}: ` : ""}${words(point)}`).join(" · ")}`;
  }
  function read() {
    const x = at ?? xs.at(-1);
    readout.textContent = x === undefined ? "" : `${at === null ? "newest: " : ""}${said(x)}`;
  }

  function draw() {
    const width = Math.floor(slot.clientWidth);
    if (!width) return;
    const all = series.flatMap((one) => one.points);
    if (!all.length) return slot.replaceChildren(h("p", { class: "quiet none" }, "Nothing yet"));
    const held = slot.contains(document.activeElement);
    const [left, right, top, bottom] = [52, width - 12, 10, HEIGHT - 38];
    const ends = all.flatMap(([, y, range]) => [y, ...(range ?? [])]).concat(from ?? []);
    const yMarks = ticks(Math.min(...ends) * scale, Math.max(...ends) * scale, 4).map((v) => v / scale);
    if (yMarks.length === 1) yMarks.push(yMarks[0] + 1 / scale);
    const [low, high] = [yMarks[0], yMarks.at(-1)];
    const end = Math.max(xMax ?? 0, xs.at(-1), 1);
    const xMarks = ticks(0, end, width < 480 ? 4 : 6).filter((v) => v <= end && Number.isInteger(v));
    const px = (x) => left + (x / end) * (right - left - 6);
    const py = (y) => bottom - ((y - low) / (high - low)) * (bottom - top);
    const svg = s("svg", { width, height: HEIGHT, role: "img", tabindex: 0, "aria-label": `${title}. ${series.filter((one) => one.points.length).map((one) => `${one.name}: ${words(one.points[0])} at first, ${words(one.points.at(-1))} at ${xLabel} ${one.points.at(-1)[0]}`).join("; ")}. Arrow keys read single values.` });
    const places = decimals(yMarks.map((v) => v * scale));
    for (const v of yMarks) {
      svg.append(s("line", { class: "grid", x1: left, x2: right, y1: py(v), y2: py(v) }),
        s("text", { class: "tick", x: left - 8, y: py(v) + 4, "text-anchor": "end" }, `${num(v * scale, places)}${unit}`));
    }
    for (const v of xMarks) svg.append(s("text", { class: "tick", x: px(v), y: bottom + 18, "text-anchor": "middle" }, num(v)));
    svg.append(s("text", { class: "tick", x: (left + right) / 2, y: HEIGHT - 2, "text-anchor": "middle" }, xLabel));
    series.forEach((one, kind) => {
      const k = kind % SHAPES.length;
      for (const [x, , range] of one.points) {
        if (range) svg.append(s("path", { class: `whisker thin k${k}`, d: `M${px(x)} ${py(range[0])}V${py(range[1])}M${px(x) - 3} ${py(range[0])}h6M${px(x) - 3} ${py(range[1])}h6` }));
      }
      if (!one.bare) svg.append(s("polyline", { class: `line k${k}`, "stroke-dasharray": DASHES[k], points: one.points.map(([x, y]) => `${px(x)},${py(y)}`).join(" ") }));
      const marked = one.points.length <= MARKED ? one.points : one.points.slice(-1);
      for (const [x, y] of marked) svg.append(mark(SHAPES[k], px(x), py(y), k));
    });
    if (at !== null && xs.includes(at)) svg.append(s("line", { class: "ref", x1: px(at), x2: px(at), y1: top, y2: bottom }));
    svg.addEventListener("pointermove", (event) => {
      const x = ((event.clientX - svg.getBoundingClientRect().left - left) / (right - left - 6)) * end;
      point(xs.reduce((best, one) => (Math.abs(one - x) < Math.abs(best - x) ? one : best), xs[0]));
    });
    svg.addEventListener("pointerleave", () => point(null));
    svg.addEventListener("blur", () => point(null));
    svg.addEventListener("keydown", (event) => {
      const now = xs.indexOf(at ?? xs.at(-1));
      const to = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: xs.length - 1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      point(xs[Math.max(0, Math.min(xs.length - 1, to))]);
      announce(said(at));
    });
    slot.replaceChildren(svg);
    if (held) svg.focus({ preventScroll: true });
  }

  function point(x) {
    if (x === at) return;
    at = x;
    read();
    // The line alone: a new picture would take the pointer's place and the focus away.
    const svg = slot.querySelector("svg");
    svg?.querySelector(".ref")?.remove();
    if (at === null || !svg) return;
    const [left, right] = [52, Math.floor(slot.clientWidth) - 12];
    const place = left + (at / Math.max(xMax ?? 0, xs.at(-1), 1)) * (right - left - 6);
    svg.append(s("line", { class: "ref", x1: place, x2: place, y1: 10, y2: HEIGHT - 38 }));
  }

  let width = 0;
  new ResizeObserver(([entry]) => {
    const now = Math.floor(entry.contentRect.width);
    if (now && now !== width) {
      width = now;
      draw();
    }
  }).observe(slot);
  return {
    node,
    set(next) {
      const same = JSON.stringify([series, xMax]) === JSON.stringify([next.series, next.xMax ?? null]);
      series = next.series;
      xMax = next.xMax ?? null;
      xs = [...new Set(series.flatMap((one) => one.points.map(([x]) => x)))].sort((a, b) => a - b);
      if (at !== null && !xs.includes(at)) at = null;
      noteNode.textContent = next.note ?? note;
      if (same) return;
      legend.replaceChildren(...(series.length > 1 ? series.map((one, kind) => {
        const k = kind % SHAPES.length;
        return h("li", {}, s("svg", { width: 34, height: 14, "aria-hidden": "true" },
          one.bare ? null : s("line", { class: `line k${k}`, x1: 1, x2: 33, y1: 7, y2: 7, "stroke-dasharray": DASHES[k] }), mark(SHAPES[k], 17, 7, k)), one.name);
      }) : []));
      legend.hidden = series.length < 2;
      read();
      draw();
    },
  };
}
