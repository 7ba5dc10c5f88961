// Bundle: what the served draft is, where it comes from, how it was measured.

import { get } from "/assets/api.js";
import { bytes, day, empty, facts, folded, h, hash, loading, num, percent, span, table, tile } from "/assets/dom.js";
import { doubts, drafting } from "/assets/kinds.js";
import { markdown } from "/assets/markdown.js";
import { ofModel } from "/assets/model.js";
import { problem } from "/assets/notices.js";
import { intervals, lines } from "/assets/plot.js";

export const title = "Bundle";

const SHOWN_POSITIONS = 8;

export function show(main) {
  const gone = new AbortController();
  const body = h("div", {});
  main.append(body);
  const fill = async () => {
    body.replaceChildren(loading("the bundle"));
    try {
      body.replaceChildren(...(await content(gone.signal)));
    } catch (error) {
      if (error.name === "AbortError") return;
      body.replaceChildren(problem(error, fill));
    }
  };
  fill();
  return () => gone.abort();
}

/** The records that the bundle itself holds, with their summaries. */
async function measured(bundle, signal) {
  const own = new Set((bundle.files ?? []).map((file) => file.path.match(/^results\/(.*)\.json$/)?.[1]));
  const list = (await get(ofModel("/api/records"), signal)).filter(({ name, kind }) => kind === "decode" && own.has(name));
  const all = await Promise.all(list.map(async ({ name }) => {
    const path = `/api/records/${encodeURIComponent(name)}`;
    const [record, summary] = await Promise.all([get(ofModel(path), signal), get(ofModel(`${path}/summary`), signal)]);
    return { name, record, summary };
  }));
  return all.sort((a, b) => label(a).localeCompare(label(b)));
}

const label = ({ record }) => `${record.workload.name}, ${drafting(record.settings.drafting)}`;

async function content(signal) {
  const { bundle, results_md: results, card_md: card } = await get(ofModel("/api/bundle"), signal);
  if (!bundle) {
    return [empty("No bundle", "The server decodes with the target alone, or an ordinary model drafts (--draft-model). Start it with a bundle, or switch one in while it runs.",
      h("pre", {}, h("code", {}, "draftsmith serve --bundle bundles/smollm2-135m-instruct-eagle3")))];
  }
  const records = await measured(bundle, signal);
  const { target, draft, training, recommended } = bundle;
  return [
    h("h1", {}, bundle.name),
    h("p", { class: "lead" }, `A draft by the method ${bundle.method === "eagle3" ? "EAGLE-3" : bundle.method} for ${target.name}. ${bundle.license ? `${bundle.license}, ` : ""}made ${day(bundle.created_unix_s)}.`),
    ...(records.length ? plots(records) : [empty("Not measured", "The bundle has no records of its own.", h("pre", {}, h("code", {}, "draftsmith bench --bundle DIR --workload FILE")))]),
    recommended ? h("p", { class: "notice calm" }, h("strong", {}, `Recommended: a chain of ${recommended.depth}. `), recommended.because ?? "") : null,
    h("section", {}, h("h2", {}, "Provenance"), facts([
      ["Target", [target.name, " ", hash(target.weights_sha256)]],
      ["Found at", target.references?.length ? h("ul", { class: "plain" }, target.references.map((reference) => h("li", {}, h("code", {}, reference)))) : null],
      ["Shape of the target", `${num(target.num_layers)} layers, width ${num(target.hidden_size)}, ${num(target.vocab_size)} tokens, ${target.weight_format ?? ""}`],
      ["Tokenizer, template", [hash(target.tokenizer_sha256), " ", hash(target.template_sha256)]],
      ["Draft", `${num(draft.parameters)} parameters, ${draft.dtype}, width ${num(draft.hidden_size)}, ${num(draft.draft_vocab_size)} tokens`],
      ["Reads target layers", draft.target_layer_ids?.join(", ")],
      ...(training ? [
        ["Trained", `${num(training.steps)} steps, ${num(training.tokens_read ?? training.trained_tokens_seen)} tokens with their prompts, ${training.wall_s ? span(training.wall_s) : ""}`],
        ["Answers", training.on_policy ? "written by the target itself" : "as the data has them"],
        ["Checkpoint chosen by", training.chosen_by],
        ["Seed, peak rate", `${training.seed}, ${training.lr_peak}`],
        ["Run file", hash(training.run_sha256)],
      ] : []),
      ["draftsmith", bundle.draftsmith_version],
    ])),
    training?.data?.length ? h("section", {}, h("h2", {}, "Data"), table(["set", "rows", "tokens", "trained", "hash"],
      training.data.map((set) => [set.name, num(set.rows), num(set.tokens), num(set.trained_tokens), hash(set.sha256)]), ["", "r", "r", "r"]),
      h("p", { class: "quiet" }, `Licences: ${[...new Set(training.data.flatMap((set) => set.licenses ?? []))].join("; ")}.`)) : null,
    folded("Files", () => table(["file", "size", "sha256"], (bundle.files ?? []).map((file) => [h("code", {}, file.path), bytes(file.bytes), hash(file.sha256)]), ["", "r"])),
    results ? folded("RESULTS.md", () => markdown(results)) : null,
    card ? folded("Model card", () => markdown(card)) : null,
  ].filter(Boolean);
}

/** Per set the record that saw most positions: the deepest fixed chain, or whatever there is without one. */
function deepestChains(records) {
  const depth = ({ record }) => (record.settings.drafting.shape === "chain" ? record.settings.drafting.depth : 0);
  const sets = new Map();
  for (const one of records.filter(({ summary }) => summary.accept_rate_at.length)) {
    const set = one.record.workload.name;
    if (!sets.has(set) || depth(one) > depth(sets.get(set))) sets.set(set, one);
  }
  return [...sets.values()];
}

function plots(records) {
  const samples = records.reduce((total, { summary }) => total + summary.samples, 0);
  const same = records.reduce((total, { summary }) => total + summary.identical_samples, 0);
  const best = records.reduce((a, b) => ((b.summary.speedup ?? 0) > (a.summary.speedup ?? 0) ? b : a));
  const longest = records.reduce((a, b) => ((b.summary.accept_len ?? 0) > (a.summary.accept_len ?? 0) ? b : a));
  const named = (doubt, record) => ({ ...doubt, message: `${label(record)}: ${doubt.message}` });
  const kind = ({ record }) => (record.settings.drafting.shape === "auto" ? 0 : 1);
  const rows = (value, range) => records.map((one) => ({ label: label(one), value: one.summary[value], interval: one.summary[range], kind: kind(one) }));
  const machines = [...new Set(records.map(({ record }) => `${record.machine.cpu}, ${record.settings.threads} threads`))];
  const deepest = deepestChains(records);
  const cut = deepest.some(({ summary }) => summary.accept_rate_at.length > SHOWN_POSITIONS);
  return [
    h("div", { class: "tiles" },
      tile("Same text", same === samples ? "yes, every one" : `${num(same)} of ${num(samples)}`, `${num(samples)} answers, token for token as without the draft`),
      tile("Longest accept length", num(longest.summary.accept_len, 2), label(longest)),
      tile("Best speedup", `${num(best.summary.speedup, 2)}×`, `${label(best)}; over ${best.summary.speedup_baseline}`)),
    doubts(records.flatMap((one) => one.summary.doubts.map((doubt) => named(doubt, one)))),
    intervals("Accept length", "tokens committed per verify step, with 95 % intervals", rows("accept_len", "accept_len_ci95"), { from: 1 }),
    intervals("Speedup", `decode time per token over ${best.summary.speedup_baseline}, with 95 % intervals`, rows("speedup", "speedup_ci95"), { unit: "×", from: 0.5, line: { at: 1, label: "no draft" } }),
    lines("Accept rate per position", `Guesses accepted ÷ steps that guessed this far, for the deepest chain of each set${cut ? `; the first ${SHOWN_POSITIONS} positions` : ""}.`,
      deepest.map((one) => ({ name: label(one), points: one.summary.accept_rate_at.slice(0, SHOWN_POSITIONS).map((y, i) => [i + 1, y]) })),
      { xLabel: "position", yFormat: (v) => percent(v, 1), unit: " %", scale: 100 }),
    h("p", { class: "quiet" }, `Measured on ${machines.join("; ")}. Records: `, records.flatMap(({ name }, i) => [i ? ", " : "", h("a", { href: `#/records/${encodeURIComponent(name)}` }, name)]), "."),
  ];
}
