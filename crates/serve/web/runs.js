// Runs: how far each is, and one with the curves of its training, asked for again while it goes on.

import { get } from "/assets/api.js";
import { curve } from "/assets/curve.js";
import { day, empty, facts, folded, h, loading, num, percent, span, table, tile, withInterval } from "/assets/dom.js";
import { problem } from "/assets/notices.js";

export const title = "Runs";

const PACE_MS = { running: 2000, else: 10_000 };
const STATES = { running: "running", done: "done", interrupted: "interrupted", unfinished: "not finished", waiting: "waiting" };
/** Positions of a proposal whose accuracy is drawn, where there are more than fit. */
const SHOWN = [0, 1, 3, 7];

const link = (name) => `#/runs/${encodeURIComponent(name)}`;
const chip = (state) => h("span", { class: `chip state-${state}` }, STATES[state] ?? state);

/** The stage that is under way, or the next one. */
const present = (run) => run.stages.find(({ state }) => state === "running" || state === "interrupted") ?? run.stages.find(({ state }) => state === "waiting");

/** How far something is, as a bar with the words for it. */
function bar(progress) {
  if (!progress?.total) return null;
  const share = Math.min(1, progress.done / progress.total);
  const fill = h("span");
  fill.style.width = `${share * 100}%`;
  return h("div", { class: "progress wide", role: "progressbar", ariaValueMin: "0", ariaValueMax: "100", ariaValueNow: String(Math.round(share * 100)), ariaLabel: progress.task }, fill);
}

function progressWords(stage) {
  const { progress, state } = stage;
  if (!progress) return "";
  const bits = [`${progress.task}: ${num(progress.done)}${progress.total ? ` of ${num(progress.total)}` : ""} ${progress.unit}`];
  if (progress.eta_s !== null && state === "running") bits.push(`${span(progress.eta_s)} left`);
  if (progress.detail) bits.push(progress.detail);
  return bits.join(", ");
}

export function show(main, [name]) {
  const gone = new AbortController();
  const trouble = h("div");
  const body = h("div", {}, loading("runs"));
  main.append(trouble, body);
  const view = name ? oneView(name) : listView();
  let shown = false;
  let timer = null;
  const look = async () => {
    clearTimeout(timer);
    timer = null;
    let pace = PACE_MS.else;
    try {
      const found = await get(name ? `/api/runs/${encodeURIComponent(name)}` : "/api/runs", gone.signal);
      if (!shown) body.replaceChildren(...view.nodes);
      shown = true;
      view.set(found);
      trouble.replaceChildren();
      if ([found].flat().some(({ state }) => state === "running")) pace = PACE_MS.running;
    } catch (error) {
      if (error.name === "AbortError") return;
      if (error.code === "no_runs") {
        body.replaceChildren(h("h1", {}, title), empty("No runs are shown", "The server was not told where your runs are. Start it with their folder, and they appear here with their training curves, while they go on.",
          h("pre", {}, h("code", {}, "draftsmith serve --bundle DIR --runs runs"))));
        return;
      }
      // What was there stays, with the reason why it is old.
      if (!shown) body.replaceChildren();
      trouble.replaceChildren(problem(error, look));
    }
    if (timer === null && !document.hidden && !gone.signal.aborted) timer = setTimeout(look, pace);
  };
  const seen = () => !document.hidden && look();
  document.addEventListener("visibilitychange", seen, { signal: gone.signal });
  document.addEventListener("key-changed", look, { signal: gone.signal });
  look();
  return () => {
    clearTimeout(timer);
    gone.abort();
  };
}

function listView() {
  const list = h("div", {});
  let before = "";
  return {
    nodes: [h("h1", {}, title), h("p", { class: "lead" }, "Trainings of drafts, from their folders. What goes on is asked for again every two seconds."), list],
    set(runs) {
      const now = JSON.stringify(runs);
      if (now === before) return;
      before = now;
      const held = list.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
      list.replaceChildren(runs.length ? h("ul", { class: "records" }, [...runs].sort((a, b) => (b.written_unix_s ?? 0) - (a.written_unix_s ?? 0)).map(row))
        : empty("No runs yet", "A run appears here as soon as it has begun.", h("pre", {}, h("code", {}, "draftsmith make TARGET --data FILE"))));
      if (held) [...list.querySelectorAll("a")].find((one) => one.getAttribute("href") === held)?.focus();
    },
  };
}

function row(run) {
  const stage = present(run);
  const how = run.state === "done" || !stage ? null : [stage.state === "waiting" ? `next: ${stage.stage}` : stage.stage, progressWords(stage)].filter(Boolean).join(" · ");
  return h("li", {}, h("a", { class: "record run", href: link(run.name) },
    h("span", { class: "record-name" }, run.name),
    h("span", { class: "row" }, chip(run.state), run.method ? h("span", { class: "chip" }, run.method) : null),
    h("span", { class: "quiet record-day" }, run.best_accept_len ? `accept length ${num(run.best_accept_len, 2)}` : ""),
    how ? h("span", { class: "quiet run-how" }, how) : null,
    run.state === "running" ? bar(stage?.progress) : null,
    run.errors.length ? h("span", { class: "differs run-how" }, run.errors[0]) : null));
}

function oneView(name) {
  const head = h("p", { class: "lead" });
  const errors = h("div");
  const tiles = h("div", { class: "tiles" });
  const now = h("div", { class: "now" });
  const stages = h("ol", { class: "stages" });
  const loss = curve("Loss", "of training, as the log has it", { format: (v) => num(v, 3) });
  const accuracy = curve("Accuracy", "share of right guesses in training, per position of a proposal", { format: (v) => percent(v, 1), scale: 100, unit: " %", from: 0 });
  const length = curve("Accept length", "measured: committed tokens per verify step on held-out prompts, with 95 % intervals", { format: (v) => num(v, 2), from: 1 });
  const charts = h("div", { class: "curves-large" }, length.node, loss.node, accuracy.node);
  const none = empty("No curves yet", "They begin with stage train.");
  const left = h("p", { class: "quiet" });
  let last = null;
  const numbers = folded("The measurements", () => measurements(last));
  const details = h("section", {});
  let drawn = "";
  return {
    nodes: [
      h("nav", { class: "crumbs", ariaLabel: "Where you are" }, h("a", { href: "#/runs" }, title), h("span", { ariaHidden: "true" }, " / "), h("span", {}, name)),
      h("h1", {}, name), head, errors, tiles, now, stages, none, charts, left, numbers, details,
    ],
    set(run) {
      last = run;
      const curves = run.curve ?? { steps: [], validations: [], total_steps: null, unread_lines: 0, every: 1 };
      head.replaceChildren(chip(run.state), ` ${[run.method, run.written_unix_s ? `last written ${day(run.written_unix_s)}` : null].filter(Boolean).join(" · ")}`);
      errors.replaceChildren(...(run.errors.length ? [h("div", { class: "notice" }, h("strong", {}, "Not all of this run can be read"), h("ul", {}, run.errors.map((error) => h("li", {}, error))))] : []));
      const newest = curves.steps.at(-1);
      const best = curves.validations.reduce((a, b) => (a && a.accept_len >= b.accept_len ? a : b), null);
      tiles.replaceChildren(
        tile("Best accept length", num(best?.accept_len, 2), best ? `${best.low !== null ? `95 % interval ${num(best.low, 2)} to ${num(best.high, 2)}, ` : ""}${best.mean_of.length ? `mean of steps ${best.mean_of.join(", ")}` : `step ${num(best.step)}`}` : "nothing measured yet"),
        tile("Step", newest ? `${num(newest.step)}${curves.total_steps ? ` of ${num(curves.total_steps)}` : ""}` : "–", newest?.tokens_per_s ? `${num(newest.tokens_per_s)} trained tokens/s` : null),
        tile("Loss", num(newest?.loss, 3), newest?.lr ? `learning rate ${newest.lr.toPrecision(2)}` : null));
      const stage = run.state === "running" ? present(run) : null;
      now.replaceChildren(...(stage?.progress ? [h("p", { class: "quiet" }, progressWords(stage)), bar(stage.progress)].filter(Boolean) : []));
      stages.replaceChildren(...run.stages.map((one) => h("li", { class: `stage state-${one.state}` }, h("span", { class: "stage-name" }, one.stage), h("span", { class: "quiet" }, [STATES[one.state] ?? one.state, one.seconds ? span(one.seconds) : null].filter(Boolean).join(", ")))));
      none.hidden = curves.steps.length + curves.validations.length > 0;
      charts.hidden = numbers.hidden = !none.hidden;
      draw(curves);
      left.textContent = [
        curves.every > 1 ? `Every ${curves.every}th line of the log is drawn.` : "",
        curves.unread_lines ? `${num(curves.unread_lines)} ${curves.unread_lines === 1 ? "line" : "lines"} of the log could not be read and ${curves.unread_lines === 1 ? "is" : "are"} left out.` : "",
      ].filter(Boolean).join(" ");
      left.hidden = !left.textContent;
      const state = JSON.stringify([curves.validations, run.stages.map(({ summary }) => summary)]);
      if (state === drawn) return;
      drawn = state;
      if (numbers.open) numbers.replaceChildren(numbers.firstChild, measurements(run));
      else numbers.replaceChildren(numbers.firstChild);
      const verdict = run.stages.find(({ stage: of }) => of === "bench")?.summary?.verdict;
      details.replaceChildren(h("h2", {}, "The run"), facts([
        ["Verdict", verdict?.says],
        ["What limits it", verdict?.limits?.length ? h("ul", {}, verdict.limits.map((one) => h("li", {}, one))) : null],
        ["Next", verdict?.next ? h("code", {}, verdict.next) : null],
        ["Target", [run.target].flat().filter(Boolean).length ? h("ul", { class: "plain" }, [run.target].flat().map((one) => h("li", {}, h("code", {}, one)))) : null],
        ["Kind of draft", run.method],
      ]));
    },
  };

  function draw(curves) {
    const xMax = curves.total_steps;
    loss.set({ xMax, series: [{ name: "loss", points: curves.steps.filter((one) => one.loss !== null).map((one) => [one.step, one.loss]) }] });
    const positions = Math.max(0, ...curves.steps.map((one) => one.acc.length));
    const shown = positions <= SHOWN.length ? [...Array(positions).keys()] : SHOWN.filter((i) => i < positions);
    accuracy.set({ xMax, series: shown.map((i) => ({ name: `position ${i + 1}`, points: curves.steps.filter((one) => (one.acc[i] ?? null) !== null).map((one) => [one.step, one.acc[i]]) })).filter((one) => one.points.length) });
    const points = (list) => list.map((one) => [one.step, one.accept_len, one.low === null || one.high === null ? null : [one.low, one.high]]);
    const means = curves.validations.filter((one) => one.mean_of.length);
    length.set({ xMax, series: [
      { name: "the draft as trained", points: points(curves.validations.filter((one) => !one.mean_of.length)) },
      // Several are measured at the same step, the last; the best of them is the one that counts.
      ...(means.length ? [{ name: "best mean of several", bare: true, points: points([means.reduce((a, b) => (b.accept_len > a.accept_len ? b : a))]) }] : []),
    ] });
  }
}

/** Every measurement as a table. */
function measurements(run) {
  return table(["step", "accept length", "verify steps", "draft"], (run.curve?.validations ?? []).map((one) => [
    num(one.step), withInterval(one.accept_len, one.low === null ? null : [one.low, one.high], 3), num(one.verify_steps),
    `${one.mean_of.length ? `mean of steps ${one.mean_of.join(", ")}` : "as trained"}${one.best ? ", best so far" : ""}`]), ["r", "r", "r"]);
}
