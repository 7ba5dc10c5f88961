// Records: the list, and one record with its plots. The JSON is the one that the program writes.

import { get } from "/assets/api.js";
import { day, empty, facts, folded, h, hash, loading, num } from "/assets/dom.js";
import { drafting, kindOf } from "/assets/kinds.js";
import { ofModel } from "/assets/model.js";
import { problem } from "/assets/notices.js";

export const title = "Records";

export function show(main, [name]) {
  const gone = new AbortController();
  const body = h("div", {}, loading("records"));
  main.append(body);
  const fill = async () => {
    body.replaceChildren(loading("records"));
    try {
      body.replaceChildren(...(name ? await one(name, gone.signal) : await list(gone.signal)));
    } catch (error) {
      if (error.name !== "AbortError") body.replaceChildren(problem(error, fill));
    }
  };
  fill();
  return () => gone.abort();
}

async function list(signal) {
  const records = await get(ofModel("/api/records"), signal);
  const head = [h("h1", {}, title), h("p", { class: "lead" }, "What was measured, with the raw samples. Every number in this page comes from one of these files.")];
  if (!records.length) {
    return [...head, empty("No records yet", "Records appear here once the bundle has results, or the server was started with a folder of them.",
      h("pre", {}, h("code", {}, "draftsmith bench --bundle DIR --workload FILE --record records/first.json\ndraftsmith serve --bundle DIR --records records")))];
  }
  const rows = records.toSorted((a, b) => (b.created ?? 0) - (a.created ?? 0) || a.name.localeCompare(b.name)).map((record) => ({
    text: `${record.name} ${record.kind ?? ""}`.toLowerCase(),
    node: h("li", {}, h("a", { class: "record", href: `#/records/${encodeURIComponent(record.name)}` },
      h("span", { class: "record-name" }, record.name), h("span", { class: "chip" }, kindWords(record.kind)),
      h("span", { class: "quiet record-day" }, record.created ? day(record.created) : ""))),
  }));
  const left = h("p", { class: "quiet left", role: "status" });
  const filter = h("input", { type: "search", placeholder: "Filter", ariaLabel: "Filter records", oninput: () => {
    const words = filter.value.toLowerCase().split(/\s+/);
    let shown = 0;
    for (const row of rows) {
      row.node.hidden = !words.every((word) => row.text.includes(word));
      shown += row.node.hidden ? 0 : 1;
    }
    left.textContent = shown === rows.length ? "" : shown ? `${num(shown)} of ${num(rows.length)}` : "No record fits.";
  } });
  return [...head, rows.length > 6 ? filter : null, left, h("ul", { class: "records" }, rows.map((row) => row.node))].filter(Boolean);
}

/** The server's word for a kind, in ours. */
function kindWords(kind) {
  return { decode: "with and without the draft", peers: "engines compared", training: "training step", kernels: "kernels", tuning: "drafting tuned", identity: "identity" }[kind] ?? "other";
}

async function one(name, signal) {
  const path = `/api/records/${encodeURIComponent(name)}`;
  const record = await get(ofModel(path), signal);
  const [kind, , draw] = kindOf(record);
  const summary = record.format === "draftsmith-bench-record" ? await get(ofModel(`${path}/summary`), signal) : null;
  const raw = JSON.stringify(record, null, 2);
  const file = URL.createObjectURL(new Blob([raw], { type: "application/json" }));
  signal.addEventListener("abort", () => URL.revokeObjectURL(file));
  const { settings, machine, workload } = record;
  return [
    h("nav", { class: "crumbs", ariaLabel: "Where you are" }, h("a", { href: "#/records" }, "Records"), h("span", { ariaHidden: "true" }, " / "), h("span", {}, name)),
    h("h1", {}, workload?.name ?? name),
    h("p", { class: "lead" }, [kind, settings?.drafting ? drafting(settings.drafting) : null, record.created_unix_s ? day(record.created_unix_s) : null].filter(Boolean).join(" · ")),
    ...draw(record, summary).filter(Boolean),
    h("section", {}, h("h2", {}, "How it was measured"), facts([
      ["Target", record.target?.name ? [record.target.name, record.target.kind ? `, ${record.target.kind} ` : " ", hash(record.target.sha256)] : null],
      ["Draft", record.draft?.name ? [record.draft.name, " ", hash(record.draft.sha256)] : null],
      ["Prompts", workload ? `${workload.name}, ${num(workload.rows_wanted)} of ${num(workload.rows_total)}` : Array.isArray(record.rows) ? num(record.rows.length) : null],
      ["Sampling", settings ? (settings.temperature > 0 ? `temperature ${settings.temperature}, seed ${settings.seed}` : "greedy") : null],
      ["Longest answer", settings ? `${num(settings.max_new_tokens)} tokens` : null],
      ["Threads", num(settings?.threads ?? record.threads) === "–" ? null : num(settings?.threads ?? record.threads)],
      ["Machine", machine?.cpu ? `${machine.cpu}, ${machine.logical_cpus} processors, ${num(machine.memory_bytes / 1e9)} GB` : typeof machine === "string" ? machine : null],
      ["Instructions", machine?.cpu_features ? machine.cpu_features.join(", ") : null],
      ["Load before", machine?.load_average_1m !== undefined && machine?.load_average_1m !== null ? num(machine.load_average_1m, 2) : null],
      ["draftsmith", record.draftsmith_version ?? null],
    ])),
    folded(`Raw JSON, ${num(raw.length / 1000, 1)} kB`, () => h("pre", { class: "raw", tabIndex: 0 }, h("code", {}, raw))),
    h("p", {}, h("a", { class: "button", href: file, download: `${name}.json` }, "Download JSON")),
  ];
}
