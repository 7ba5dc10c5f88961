// Generations: what was just decoded, with the tokens of every verify step: in this tab, and what the server kept of all
// that asked with the same key, if it was started to keep any.

import { get } from "/assets/api.js";
import { day, empty, facts, folded, h, loading, ms, num, percent, s, table, tile } from "/assets/dom.js";
import { entries, steps, subscribe } from "/assets/journal.js";
import { problem } from "/assets/notices.js";
import { Answer, ORIGINS, legend } from "/assets/tokens.js";

export const title = "Generations";

const PACE_MS = 3000;

export function show(main, [place, id]) {
  const gone = new AbortController();
  if (place) {
    showOne(main, place, id, gone.signal);
    return () => gone.abort();
  }
  const list = h("div", {});
  const trouble = h("div");
  const note = h("p", { class: "quiet" });
  main.append(h("h1", {}, title), h("p", { class: "lead" }, "What was just decoded, newest first: how each token was made, how many every verify step committed, and how fast."), trouble, list, note);
  let kept = null;
  let timer = null;
  let before = "";
  const fill = () => {
    const now = JSON.stringify([entries.map((entry) => entry.id), kept?.map((entry) => entry.id)]);
    if (now === before) return;
    before = now;
    const held = list.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
    list.replaceChildren(...content(kept ?? []));
    note.textContent = kept ? "" : "These are the answers of this tab; they are gone when it is closed. To see those of other programs here, too, start the server with --keep-generations N.";
    if (held) [...list.querySelectorAll("a")].find((one) => one.getAttribute("href") === held)?.focus();
  };
  const look = async () => {
    clearTimeout(timer);
    timer = null;
    try {
      kept = await get("/api/generations", gone.signal);
      trouble.replaceChildren();
    } catch (error) {
      if (error.name === "AbortError") return;
      kept = null;
      fill();
      // Not to keep any is no fault; then there is nothing to ask for again.
      if (error.code === "keeps_no_generations") return;
      trouble.replaceChildren(problem(error, look));
    }
    fill();
    if (timer === null && !document.hidden && !gone.signal.aborted) timer = setTimeout(look, PACE_MS);
  };
  document.addEventListener("visibilitychange", () => !document.hidden && kept && look(), { signal: gone.signal });
  document.addEventListener("key-changed", look, { signal: gone.signal });
  const unsubscribe = subscribe(fill);
  if (entries.length) fill();
  look();
  return () => {
    clearTimeout(timer);
    gone.abort();
    unsubscribe();
  };
}

/** Those of this tab and those that the server kept, each once. */
function content(kept) {
  const mine = new Set(entries.map((entry) => entry.end?.id).filter(Boolean));
  const all = [
    ...entries.map((entry) => ({ at: entry.at, node: row(entry) })),
    ...kept.filter(({ id }) => !mine.has(id)).map((entry) => ({ at: entry.time * 1000, node: keptRow(entry) })),
  ].sort((a, b) => b.at - a.at);
  if (!all.length) {
    return [empty("Nothing generated yet", "Ask something in the playground or let the draft race: every answer is listed here with its verify steps.",
      h("div", { class: "row" }, h("a", { class: "button", href: "#/play" }, "Playground"), h("a", { class: "button", href: "#/race" }, "Race")))];
  }
  return [h("ul", { class: "records" }, all.map(({ node }) => h("li", {}, node)))];
}

/** The first words of a prompt. */
const opening = (prompt) => prompt.trim().split("\n")[0].slice(0, 160) || "an empty prompt";

/** What people asked, out of a prompt as the model's template wrote it: its last part of some length. */
function question(prompt) {
  const text = prompt.replace(/<\|[^|>]*\|>(system|user|assistant|model)?|<\/?(s|start_of_turn|end_of_turn)>|\[\/?INST\]/g, "\n");
  const lines = text.split("\n").map((line) => line.trim()).filter((line) => line && !/^(assistant|user|model)$/.test(line));
  return lines.at(-1) ?? prompt;
}

function card(href, heading, where, at, line, band) {
  return h("a", { class: "record generation", href }, h("span", { class: "record-name" }, heading), h("span", { class: "chip" }, where),
    h("span", { class: "quiet record-day" }, day(at / 1000)), h("span", { class: "quiet run-how" }, line), band);
}

const line = (tokens, length, rate, ...more) => [`${num(tokens)} tokens`, length ? `accept length ${num(length, 2)}` : null, rate ? `${num(rate)} tokens/s` : null, ...more].filter(Boolean).join(" · ");

const row = (entry) => card(`#/generations/tab/${entry.id}`, opening(entry.prompt), entry.where, entry.at,
  line(entry.tokens.length, entry.acceptLen, entry.rate, entry.drafting, entry.stopped ? "broken off" : entry.finish === "length" ? "cut at the longest answer" : null),
  strip(entry.tokens.map((token) => [token.origin, 1])));

const keptRow = (entry) => card(`#/generations/server/${encodeURIComponent(entry.id)}`, opening(question(entry.prompt_end)), entry.route, entry.time * 1000,
  line(entry.completion_tokens, entry.accept_length, entry.tokens_per_s, entry.outcome === "length" ? "cut at the longest answer" : entry.outcome === "stop" ? null : entry.outcome),
  strip(Object.entries(entry.made)));

/** How tokens were made as one band: `[[origin, count], …]`. */
function strip(made) {
  const band = h("span", { class: "shares strip", ariaHidden: "true" });
  for (let i = 0; i < made.length; ) {
    let count = 0;
    const origin = made[i][0];
    for (; i < made.length && made[i][0] === origin; i++) count += made[i][1];
    const part = h("span", { class: origin in ORIGINS ? origin : "" });
    part.style.flexGrow = count;
    if (count) band.append(part);
  }
  return band;
}

async function showOne(main, place, id, signal) {
  if (place === "tab") {
    const entry = entries.find((one) => String(one.id) === id);
    main.append(...(entry ? one(entry) : missing()));
    return;
  }
  const body = h("div", {}, loading("the generation"));
  main.append(body);
  const fill = async () => {
    try {
      const kept = await get(`/api/generations/${encodeURIComponent(id)}`, signal);
      body.replaceChildren(...one({
        at: kept.time * 1000, where: kept.route, prompt: question(kept.prompt), messages: [{ role: "user", content: kept.prompt }], drafting: null, temperature: null,
        tokens: kept.tokens, text: kept.text, rate: kept.tokens_per_s, acceptLen: kept.accept_length, finish: kept.outcome, stopped: false,
        end: { usage: null, metrics: null, timing: kept }, cached: kept.cached_tokens,
      }));
    } catch (error) {
      if (error.name === "AbortError") return;
      body.replaceChildren(...(error.status === 404 ? missing() : [problem(error, fill)]));
    }
  };
  fill();
}

const crumbs = (name) => h("nav", { class: "crumbs", ariaLabel: "Where you are" }, h("a", { href: "#/generations" }, title), h("span", { ariaHidden: "true" }, " / "), h("span", {}, name));

const missing = () => [crumbs("gone"), h("h1", {}, title), empty("This generation is gone", "A tab keeps its generations until it is closed or loaded anew; a server keeps as many as it was started to keep.", h("a", { class: "button", href: "#/generations" }, "All generations"))];

function one(entry) {
  const answer = new Answer();
  answer.add({ text: entry.text, tokens: entry.tokens });
  const matched = answer.finish();
  const all = steps(entry.tokens);
  const { end } = entry;
  const who = { user: "You", assistant: "Model", system: "System message" };
  const prompt = entry.messages.map(({ role, content: text }) => h("article", { class: `turn ${role === "user" ? "user" : "model"}` }, h("h3", { class: "who" }, who[role] ?? role), h("div", { class: role === "user" ? "bubble" : "answer" }, text)));
  return [
    crumbs(`${entry.where}, ${day(entry.at / 1000)}`),
    h("h1", { class: "asked" }, opening(entry.prompt)),
    h("p", { class: "lead" }, [entry.drafting, entry.temperature === null ? null : entry.temperature > 0 ? `temperature ${entry.temperature}` : "greedy", entry.stopped ? "broken off" : entry.finish === "length" ? "cut at the longest answer" : null].filter(Boolean).join(" · ")),
    h("div", { class: "tiles" },
      tile("Tokens", num(entry.tokens.length), answer.sentence().replace(/^[^:]*:? ?/, "") || null),
      tile("Accept length", num(entry.acceptLen, 2), `tokens per step, ${num(all.length)} verify steps`),
      tile("Speed", entry.rate ? `${num(entry.rate)} tokens/s` : "–", end?.timing?.prefill_ms !== undefined ? `decode time alone; prompt read in ${ms(end.timing.prefill_ms)}` : "by this browser's clock")),
    all.length ? committed(all) : null,
    h("section", { class: "stack" }, h("h2", {}, "Answer"), answer.node, matched ? null : h("p", { class: "quiet" }, "Tokens and text could not be matched; the text is shown without colours."), legend()),
    facts([
      ["Prompt tokens", end?.usage ? num(end.usage.prompt_tokens) : null],
      ["Kept from earlier prompts", end?.usage?.prompt_tokens_details?.cached_tokens || entry.cached ? `${num(end?.usage?.prompt_tokens_details?.cached_tokens ?? entry.cached)} tokens` : null],
      ["Guesses", end?.metrics?.num_draft_tokens ? `${num(end.metrics.num_draft_tokens)}, ${percent(end.metrics.draft_acceptance_rate, 0)} accepted` : null],
    ]),
    folded(entry.messages.length > 1 ? "The conversation that was sent" : "The prompt", () => h("div", { class: "log" }, prompt)),
    folded("Step by step", () => table(["step", "committed", "drafted", "text"], all.map((step, i) => [num(i + 1), num(step.tokens.length), num(step.drafted), h("code", {}, JSON.stringify(step.tokens.map((token) => token.text).join("")))]), ["r", "r", "r"])),
    answer.list(),
  ].filter(Boolean);
}

/** A bar per verify step, as high as what it committed: drafted tokens below, the target's own on top. */
function committed(all) {
  const slot = h("div", { class: "plot" });
  const height = 130;
  const draw = () => {
    const width = Math.floor(slot.clientWidth);
    if (!width) return;
    const most = Math.max(...all.map((step) => step.tokens.length));
    const [left, top, bottom] = [24, 6, height - 22];
    // As many as there is room for; the rest is in the table.
    const size = Math.max(3, Math.min(18, (width - left) / all.length));
    const shown = all.slice(0, Math.floor((width - left) / size + 1e-6));
    const unit = (bottom - top) / most;
    const svg = s("svg", { width, height, role: "img", "aria-label": `Committed tokens of each verify step: ${shown.map((step) => step.tokens.length).join(", ")}` });
    for (let n = 0; n <= most; n += Math.ceil(most / 4)) {
      svg.append(s("line", { class: "grid", x1: left, x2: width, y1: bottom - n * unit, y2: bottom - n * unit }), s("text", { class: "tick", x: left - 6, y: bottom - n * unit + 4, "text-anchor": "end" }, String(n)));
    }
    shown.forEach((step, i) => {
      const group = s("g", { "data-tip": `step ${i + 1}: ${step.tokens.length} committed, ${step.drafted} of them drafted: ${JSON.stringify(step.tokens.map((token) => token.text).join(""))}` });
      step.tokens.forEach((token, n) => group.append(s("rect", { class: `cell ${token.origin}`, x: left + i * size + 0.5, y: bottom - (n + 1) * unit, width: Math.max(1, size - 1.5), height: Math.max(1, unit - 1) })));
      svg.append(group);
    });
    svg.append(s("text", { class: "tick", x: (left + width) / 2, y: height - 4, "text-anchor": "middle" }, shown.length < all.length ? `the first ${num(shown.length)} of ${num(all.length)} verify steps` : "verify steps"));
    slot.replaceChildren(svg);
  };
  new ResizeObserver(draw).observe(slot);
  return h("figure", {}, h("figcaption", {}, h("strong", {}, "Committed per verify step"), h("span", { class: "quiet" }, "drafted tokens below, the target's own on top; their mean is the accept length")), slot);
}
