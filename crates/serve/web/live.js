// Live: what the server is doing, over the last three minutes.

import { h, num, span, tile } from "/assets/dom.js";
import { problem } from "/assets/notices.js";
import { sparkline } from "/assets/plot.js";
import * as state from "/assets/state.js";

export const title = "Live";

const SPAN_MS = 180_000;
const PACE = { here: 1000, elsewhere: 3000 };

const CURVES = [
  ["tokens_per_s", "Tokens per second", "all requests together, last 10 seconds", (v) => num(v, 0)],
  ["accept_len", "Accept length", "tokens committed per verify step, last 10 seconds", (v) => num(v, 2)],
  ["running", "Running", "requests being answered", (v) => num(v)],
  ["queued", "Queued", "requests that wait", (v) => num(v)],
];

/** The accept length has the API's longer name on the wire. */
const read = (now, name) => (name === "accept_len" ? now.accept_length : now[name]) ?? null;

export function show(main) {
  const trouble = h("div");
  const facts = h("div", { class: "tiles" });
  const curves = CURVES.map(([name, heading, note, format]) => {
    const curve = sparkline(heading, [], SPAN_MS, format);
    const value = h("span", { class: "tile-value" }, "–");
    return { name, format, curve, value, node: h("section", { class: "card curve", ariaLabel: heading },
      h("div", { class: "curve-head" }, h("div", {}, h("h2", {}, heading), h("p", { class: "quiet" }, note)), value), curve.node) };
  });
  main.append(h("h1", {}, title), trouble, facts, h("div", { class: "curves" }, curves.map((one) => one.node)),
    h("p", { class: "quiet" }, "The last three minutes, asked once a second while this page is seen. For longer, scrape ", h("code", {}, "/metrics"), "; a Grafana dashboard is in ", h("code", {}, "contrib/"), "."));
  const draw = () => {
    trouble.replaceChildren(...(state.problem ? [problem(state.problem, state.refresh)] : []));
    const now = state.latest();
    if (now) {
      facts.replaceChildren(
        tile("Model", now.model),
        tile("Draft", now.has_draft ? now.draft?.name ?? "yes" : "none", now.has_draft && now.draft?.accept_length ? `accept length ${num(now.draft.accept_length, 2)} since the start` : null),
        tile("Up for", span(now.uptime_s)));
    }
    for (const { name, format, curve, value } of curves) {
      const points = state.history.map(({ at, state: then }) => [at, then && read(then, name)]);
      curve.set(points);
      value.textContent = state.problem ? "–" : format(points.at(-1)?.[1]);
    }
  };
  const unsubscribe = state.subscribe(draw);
  draw();
  state.setPace(PACE.here);
  return () => {
    unsubscribe();
    state.setPace(PACE.elsewhere);
  };
}
