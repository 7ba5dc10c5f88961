// What a record measured, told by its shape, and how each kind is drawn. Numbers are the record's own or the server's
// summary of it; nothing is estimated here.

import { facts, h, ms, num, percent, table, tile, withInterval } from "/assets/dom.js";
import { intervals, lines } from "/assets/plot.js";

const range = (estimate) => (estimate?.interval ? [estimate.interval.low, estimate.interval.high] : null);

/** Drafting of a record in words. */
export function drafting(d) {
  if (!d) return "no draft";
  if (d.shape === "auto") return "as much as pays";
  return d.shape === "tree" ? `tree, depth ${d.depth}, ${d.num_draft_tokens} tokens` : `chain of ${d.depth}`;
}

/** `[label of the kind, function that draws it]` of a record, by the first shape that fits. */
export function kindOf(record) {
  return KINDS.find(([, fits]) => fits(record)) ?? ["Other", null, () => []];
}

const KINDS = [
  ["With and without the draft", (r) => r.format === "draftsmith-bench-record", decode],
  ["Engines compared", (r) => Array.isArray(r.sides) && r.sides.some((side) => side.decode_tokens_per_s), peers],
  ["Training step compared", (r) => Array.isArray(r.sides) && r.sides.some((side) => side.slots_per_s), training],
  ["Kernels", (r) => r.t_ms, kernels],
  ["Drafting tuned", (r) => Array.isArray(r.loads), tuning],
  ["Identity", (r) => Array.isArray(r.ways), identity],
  ["Summary", (r) => r.accept_rate_at, (r) => summaryParts(r)],
  ["Accept length elsewhere", (r) => r.engine && r.accept_len, elsewhere],
];

/** The parts of a decode record: tiles, plots, doubts. */
function decode(record, summary) {
  if (!summary) return [h("p", { class: "quiet" }, "The server could not summarise this record; the raw data is below.")];
  return summaryParts(summary, drafting(record.settings?.drafting));
}

function summaryParts(summary, how = null) {
  const { accept_len_ci95: lenRange, speedup_ci95: speedRange } = summary;
  const at = (rates) => rates.map((y, i) => [i + 1, y]).filter(([, y]) => y !== null);
  const series = [{ name: "of all proposals that long", points: at(summary.accept_rate_at) }];
  if (summary.cond_accept_rate_at) series.push({ name: "given the one before", points: at(summary.cond_accept_rate_at) });
  return [
    h("div", { class: "tiles" },
      tile("Same text", summary.identical ? "yes, every one" : "no", `${num(summary.identical_samples ?? summary.rows)} of ${num(summary.samples ?? summary.rows)} answers equal token for token`),
      tile("Accept length", num(summary.accept_len, 2), lenRange ? `95 % interval ${num(lenRange[0], 2)} to ${num(lenRange[1], 2)}, ${num(summary.rows)} prompts` : `${num(summary.rows)} prompts`),
      tile("Speedup", `${num(summary.speedup, 2)}×`, `${speedRange ? `95 % interval ${num(speedRange[0], 2)} to ${num(speedRange[1], 2)}; ` : ""}over ${summary.speedup_baseline ?? "decoding without the draft"}`)),
    doubts(summary.doubts),
    intervals("Tokens per second", "decode time, prompts excluded", [
      { label: "without the draft", value: summary.plain_tokens_per_s, kind: 1 },
      { label: how ? `with the draft, ${how}` : "with the draft", value: summary.spec_tokens_per_s, kind: 0 },
    ], { digits: 0 }),
    series[0].points.length
      ? lines("Accept rate per position", "How often the guess at each position of a proposal was accepted.", series, { xLabel: "position", yFormat: (v) => percent(v, 1), unit: " %", scale: 100, yMax: Math.max(0.2, ...series.flatMap((one) => one.points.map(([, y]) => y))) })
      : null,
  ];
}

/** Reasons not to trust a number, beside it. */
export function doubts(list) {
  if (!list?.length) return null;
  return h("div", { class: "notice" }, h("strong", {}, list.length === 1 ? "A doubt about these numbers" : "Doubts about these numbers"),
    h("ul", {}, list.map((doubt) => h("li", {}, doubt.message, doubt.advice ? h("span", { class: "quiet" }, ` ${doubt.advice}`) : null))));
}

function peers(record) {
  const ratio = (side) => side.first_over_this;
  const others = record.sides.filter(ratio);
  const first = record.sides[0].name;
  return [
    intervals("Tokens per second", `decoding, ${record.threads} threads, all sides in turn`, record.sides.map((side, i) => ({
      label: side.name, value: side.decode_tokens_per_s?.value, interval: range(side.decode_tokens_per_s), kind: i === 0 ? 0 : 1,
    })), { digits: 0 }),
    others.length ? intervals(`How many times as fast as each is ${first}`, "decode time per token; above 1, the first side is faster", others.map((side) => ({
      label: side.name, value: ratio(side).value, interval: range(ratio(side)), kind: 1,
    })), { unit: "×", line: { at: 1, label: "equal" } }) : null,
    table(["side", "tokens/s", "prompt tokens/s", "equal tokens"], record.sides.map((side, i) => [side.name,
      withInterval(side.decode_tokens_per_s?.value, range(side.decode_tokens_per_s), 0), num(side.prefill_tokens_per_s),
      equalTokens(record, i)]), ["", "r", "r", "r"]),
    record.batch ? h("p", {}, `${num(record.batch.sequences)} sequences at once: ${num(record.batch.tokens_per_s)} tokens/s, ${num(record.batch.over_one, 2)}× one alone.`) : null,
  ];
}

/** Tokens of a side that equal the first side's, over all rows. */
function equalTokens(record, side) {
  if (!Array.isArray(record.rows) || !record.rows.every((row) => Array.isArray(row.equal_tokens))) return "–";
  const sum = (of) => record.rows.reduce((total, row) => total + (row.equal_tokens[of] ?? 0), 0);
  return `${num(sum(side))} of ${num(sum(0))}`;
}

function training(record) {
  const others = record.sides.filter((side) => side.this_over_first);
  return [
    intervals("Trained slots per second", `${record.threads} threads`, record.sides.map((side, i) => ({ label: side.name, value: side.slots_per_s?.value, interval: range(side.slots_per_s), kind: i === 0 ? 0 : 1 })), { digits: 0 }),
    intervals(`Time of one step, ${record.sides[0].name} = 1`, "", others.map((side) => ({ label: side.name, value: side.this_over_first.value, interval: range(side.this_over_first), kind: 1 })), { unit: "×", line: { at: 1, label: "equal" } }),
    table(["side", "step", "peak memory", "last loss"], record.sides.map((side) => [side.name, ms(side.step_ms), `${num(side.peak_bytes / 1e9, 2)} GB`, num(side.last_loss, 4)]), ["", "r", "r", "r"]),
  ];
}

function kernels(record) {
  const points = Object.entries(record.t_ms).map(([m, t]) => [Number(m), t]).sort(([a], [b]) => a - b);
  const one = record.t_ms["1"];
  const eight = record.t_ms["8"];
  return [
    h("div", { class: "tiles" },
      tile("One token", ms(one), `${num(record.decode_tokens_per_s)} tokens/s decoding`),
      eight && one ? tile("Eight at once", ms(eight), `${num(eight / one, 2)}× the time of one`) : null,
      tile("Prompt", `${num(record.prefill_tokens_per_s)} tokens/s`, `${num(record.threads)} threads`)),
    lines("Time of one pass, t(m)", "m tokens checked in one pass of the target.", [{ name: "t(m)", points }], { xLabel: "m, tokens in the pass", yFormat: (v) => `${num(v, 2)} ms`, unit: " ms", even: true }),
    lines("Time per token, t(m) / m", "What makes drafting pay: checking many tokens costs little more than one.", [{ name: "t(m) / m", points: points.map(([m, t]) => [m, t / m]) }], { xLabel: "m, tokens in the pass", yFormat: (v) => `${num(v, 2)} ms`, unit: " ms", even: true }),
    record.limits ? facts([["Memory read", `${num(record.limits.read_gb_per_s, 1)} GB/s measured limit`], ["Integer products", `${num(record.limits.dot_gmac_per_s)} G/s measured limit`], ["Weights", `${num(record.limits.weight_bytes / 1e6, 1)} MB`]]) : null,
  ];
}

function tuning(record) {
  return record.loads.flatMap((load) => {
    const many = load.sequences === 1 ? "One sequence" : `${num(load.sequences)} sequences at once`;
    return [
      h("h2", {}, many),
      intervals("Tokens per second", `best: ${load.best}`, load.settings.map((one) => ({ label: one.name, value: one.tokens_per_s?.value, interval: range(one.tokens_per_s), kind: one.name === load.best ? 0 : 1 })), { digits: 0 }),
      table(["setting", "speedup over plain", "accept length", "same text"], load.settings.map((one) => [one.name,
        one.speedup ? withInterval(one.speedup.value, range(one.speedup), 2, "×") : "–", num(one.accept_len, 2), one.identical ? "yes" : "no"]), ["", "r", "r"]),
    ];
  });
}

function identity(record) {
  const tokens = record.prompts.reduce((total, prompt) => total + prompt.tokens, 0);
  return [
    h("div", { class: "tiles" },
      tile("Same text", record.identical ? "yes, every one" : "no", `${num(record.differences.length)} differences`),
      tile("Prompts", num(record.prompts.length), `${num(tokens)} tokens each way`),
      tile("Ways", num(record.ways.length), "of decoding each prompt")),
    h("h2", {}, "Ways that were compared"), h("ul", { class: "columns" }, record.ways.map((way) => h("li", {}, way))),
  ];
}

function elsewhere(record) {
  return [h("div", { class: "tiles" }, tile("Accept length", num(record.accept_len, 2), `${record.engine}, ${num(record.rows?.length)} prompts`),
    tile("Verify steps", num(record.verify_steps)), tile("Committed tokens", num(record.committed_tokens)))];
}
