// Plots as inline SVG, drawn at the width they have. Marks differ in shape and dash as well as in colour.

import { h, num, s } from "/assets/dom.js";

export const SHAPES = ["circle", "square", "triangle", "diamond", "cross", "bar"];
export const DASHES = [null, "6 4", "2 3", "8 3 2 3", "12 4", "1 5"];

/** A figure that draws itself anew when its width changes. `draw(width)` gives an SVG. */
function figure(title, note, draw, after = null) {
  const slot = h("div", { class: "plot" });
  let width = 0;
  new ResizeObserver(([entry]) => {
    const now = Math.floor(entry.contentRect.width);
    if (now && now !== width) slot.replaceChildren(draw((width = now)));
  }).observe(slot);
  return h("figure", {}, h("figcaption", {}, h("strong", {}, title), note ? h("span", { class: "quiet" }, note) : null), slot, after);
}

/** Round ends and steps for an axis over `[low, high]`. */
export function ticks(low, high, wanted) {
  const raw = (high - low || 1) / wanted;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((v) => v >= raw * 0.999);
  const first = Math.floor(low / step + 1e-9);
  const last = Math.ceil(high / step - 1e-9);
  return Array.from({ length: last - first + 1 }, (_, i) => (first + i) * step);
}

export function decimals(values) {
  return Math.max(0, ...values.map((v) => (String(Number(v.toPrecision(6))).split(".")[1] ?? "").length));
}

export function mark(shape, x, y, kind, tip) {
  const r = 4.5;
  const props = { class: `mark k${kind}`, tabindex: tip ? 0 : null, "data-tip": tip };
  if (shape === "square") return s("rect", { ...props, x: x - r + 0.5, y: y - r + 0.5, width: 2 * r - 1, height: 2 * r - 1 });
  if (shape === "triangle") return s("path", { ...props, d: `M${x} ${y - r}L${x + r} ${y + r - 1}H${x - r}Z` });
  if (shape === "diamond") return s("path", { ...props, d: `M${x} ${y - r - 0.5}L${x + r + 0.5} ${y}L${x} ${y + r + 0.5}L${x - r - 0.5} ${y}Z` });
  if (shape === "cross") return s("path", { ...props, d: `M${x - 1.5} ${y - r}h3v3h3v3h-3v3h-3v-3h-3v-3h3z` });
  if (shape === "bar") return s("rect", { ...props, x: x - r, y: y - 2, width: 2 * r, height: 4 });
  return s("circle", { ...props, cx: x, cy: y, r });
}

/**
 * Values with their intervals, one row each, on one axis.
 *
 * `rows`: `{ label, value, interval: [low, high] | null, kind, faint }`; `line`: a value to compare with, `{ at, label }`;
 * `from`: where the axis begins (default: 0).
 */
export function intervals(title, note, rows, { unit = "", digits = 2, line = null, from = 0 } = {}) {
  const shown = rows.filter((row) => row.value !== null && row.value !== undefined);
  const draw = (width) => {
    const wide = width >= 560;
    const labels = wide ? Math.min(260, width * 0.36) : 0;
    const figures = 150;
    const rowHeight = wide ? 34 : 50;
    const left = labels + 6;
    const right = width - (wide ? figures : 14);
    const top = line ? 22 : 8;
    const bottom = top + rowHeight * shown.length;
    const ends = shown.flatMap((row) => [row.value, ...(row.interval ?? [])]).concat(line ? [line.at] : [], [from]);
    const marks = ticks(Math.min(...ends), Math.max(...ends), wide ? 6 : 4);
    const [low, high] = [marks[0], marks.at(-1)];
    const x = (v) => left + ((v - low) / (high - low)) * (right - left);
    const places = decimals(marks);
    const svg = s("svg", { width, height: bottom + 30, role: "img", "aria-label": `${title}. ${shown.map((row) => `${row.label}: ${words(row)}`).join("; ")}` });
    for (const v of marks) {
      svg.append(s("line", { class: "grid", x1: x(v), x2: x(v), y1: top, y2: bottom }),
        s("text", { class: "tick", x: x(v), y: bottom + 18, "text-anchor": v === marks[0] && !wide ? "start" : "middle" }, `${num(v, places)}${unit}`));
    }
    if (line) {
      svg.append(s("line", { class: "ref", x1: x(line.at), x2: x(line.at), y1: top - 4, y2: bottom }),
        s("text", { class: "tick", x: x(line.at), y: top - 9, "text-anchor": x(line.at) > width / 2 ? "end" : "start" }, line.label));
    }
    shown.forEach((row, i) => {
      const kind = row.kind ?? 0;
      const y = top + rowHeight * i + (wide ? rowHeight / 2 : rowHeight - 14);
      svg.append(s("text", { class: "label", x: wide ? labels : 0, y: wide ? y + 4 : y - 16, "text-anchor": wide ? "end" : "start" }, row.label),
        s("text", { class: "figure", x: width, y: wide ? y + 4 : y - 16, "text-anchor": "end" }, words(row)));
      if (row.interval) {
        const [a, b] = row.interval.map(x);
        svg.append(s("path", { class: `whisker k${kind}`, d: `M${a} ${y}H${b}M${a} ${y - 5}v10M${b} ${y - 5}v10` }));
      }
      svg.append(mark(SHAPES[kind % SHAPES.length], x(row.value), y, kind));
    });
    return svg;
  };
  const words = (row) => `${num(row.value, digits)}${unit}${row.interval ? ` [${num(row.interval[0], digits)}, ${num(row.interval[1], digits)}]` : ""}`;
  return figure(title, note, draw);
}

/**
 * Lines over a shared x axis.
 *
 * `series`: `{ name, points: [[x, y], …] }`; `yFormat` writes a y value, an axis has `scale` times the values and `unit`; `even`: place the x values at equal distances,
 * in the order met. A table of the same values is folded below.
 */
export function lines(title, note, series, { xLabel, yLabel, yFormat = (v) => num(v, 2), unit = "", scale = 1, even = false, yMax = null, height = 260 } = {}) {
  const xs = [...new Set(series.flatMap((one) => one.points.map(([x]) => x)))].sort((a, b) => a - b);
  const draw = (width) => {
    const [left, right, top, bottom] = [56, width - 14, 12, height - 40];
    const yMarks = ticks(0, yMax ?? Math.max(...series.flatMap((one) => one.points.map(([, y]) => y))), 4);
    const px = (x) => {
      const [at, of] = even ? [xs.indexOf(x), xs.length - 1] : [x - xs[0], xs.at(-1) - xs[0]];
      return left + 10 + (of ? at / of : 0.5) * (right - left - 20);
    };
    const py = (y) => bottom - (y / yMarks.at(-1)) * (bottom - top);
    const svg = s("svg", { width, height, role: "img", "aria-label": `${title}. ${series.map((one) => `${one.name}: ${one.points.map(([x, y]) => `${x}: ${yFormat(y)}`).join(", ")}`).join("; ")}` });
    for (const v of yMarks) {
      svg.append(s("line", { class: "grid", x1: left, x2: right, y1: py(v), y2: py(v) }),
        s("text", { class: "tick", x: left - 8, y: py(v) + 4, "text-anchor": "end" }, `${num(v * scale, decimals(yMarks.map((y) => y * scale)))}${unit}`));
    }
    let lastLabel = -Infinity;
    for (const v of xs) {
      if (px(v) - lastLabel < 26) continue;
      lastLabel = px(v);
      svg.append(s("text", { class: "tick", x: px(v), y: bottom + 18, "text-anchor": "middle" }, String(v)));
    }
    svg.append(s("text", { class: "tick", x: (left + right) / 2, y: height - 4, "text-anchor": "middle" }, xLabel));
    series.forEach((one, kind) => {
      const k = kind % SHAPES.length;
      svg.append(s("polyline", { class: `line k${k}`, "stroke-dasharray": DASHES[k], points: one.points.map(([x, y]) => `${px(x)},${py(y)}`).join(" ") }));
      for (const [x, y] of one.points) svg.append(mark(SHAPES[k], px(x), py(y), k, `${one.name}, ${xLabel} ${x}: ${yFormat(y)}`));
    });
    return svg;
  };
  const legend = h("ul", { class: "keys" }, series.map((one, kind) => {
    const k = kind % SHAPES.length;
    return h("li", {}, s("svg", { width: 34, height: 14, "aria-hidden": "true" },
      s("line", { class: `line k${k}`, x1: 1, x2: 33, y1: 7, y2: 7, "stroke-dasharray": DASHES[k] }), mark(SHAPES[k], 17, 7, k)), one.name);
  }));
  const values = h("details", { class: "fold small" }, h("summary", {}, "The numbers"),
    h("div", { class: "scroll", tabIndex: 0, role: "group", ariaLabel: `${title}, as a table` },
      h("table", {}, h("thead", {}, h("tr", {}, h("th", { scope: "col" }, xLabel), series.map((one) => h("th", { class: "r", scope: "col" }, one.name)))),
        h("tbody", {}, xs.map((x) => h("tr", {}, h("td", {}, String(x)), series.map((one) => {
          const point = one.points.find(([at]) => at === x);
          return h("td", { class: "r" }, point ? yFormat(point[1]) : "");
        })))))));
  return figure(title, `${note ? `${note} ` : ""}${yLabel ?? ""}`, draw, h("div", {}, series.length > 1 ? legend : null, values));
}

/** One value over time; gaps where it is null. `points`: `[[time in ms, value | null], …]`, drawn over the last `spanMs`. */
export function sparkline(title, points, spanMs, format) {
  const draw = (width) => {
    const height = 72;
    const known = points.filter(([, v]) => v !== null);
    const top = Math.max(1e-9, ...known.map(([, v]) => v)) * 1.1;
    const end = points.at(-1)?.[0] ?? 0;
    // Room at the right for the mark of the last value.
    const x = (t) => width - 5 - ((end - t) / spanMs) * (width - 5);
    const y = (v) => height - 4 - (v / top) * (height - 12);
    const peak = known.length ? Math.max(...known.map(([, v]) => v)) : null;
    const svg = s("svg", { width, height, role: "img", "aria-label": `${title}: now ${format(points.at(-1)?.[1])}, largest in three minutes ${format(peak)}` },
      s("line", { class: "grid", x1: 0, x2: width, y1: height - 4, y2: height - 4 }));
    let path = "";
    let area = "";
    let open = null;
    points.forEach(([t, v], i) => {
      if (v === null) return (open = null);
      if (open === null) {
        open = x(t);
        path += `M${x(t)} ${y(v)}`;
        area += `M${x(t)} ${height - 4}V${y(v)}`;
      } else {
        path += `L${x(t)} ${y(v)}`;
        area += `L${x(t)} ${y(v)}`;
      }
      if (i === points.length - 1 || points[i + 1][1] === null) area += `V${height - 4}Z`;
    });
    svg.append(s("path", { class: "area", d: area }), s("path", { class: "line k0", d: path }));
    const last = points.at(-1);
    if (last && last[1] !== null) svg.append(s("circle", { class: "mark k0", cx: x(last[0]), cy: y(last[1]), r: 3 }));
    return svg;
  };
  const slot = h("div", { class: "plot spark" });
  const redraw = () => slot.clientWidth && slot.replaceChildren(draw(slot.clientWidth));
  new ResizeObserver(redraw).observe(slot);
  return { node: slot, set(next) { points = next; redraw(); } };
}
