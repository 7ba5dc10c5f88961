// Race: one prompt with and without the draft; times side by side, and whether the texts are the same.

import { chat } from "/assets/api.js";
import { announce, h, ms, num, table } from "/assets/dom.js";
import { follow } from "/assets/follow.js";
import { keep } from "/assets/journal.js";
import { chosen } from "/assets/model.js";
import { complain, keys, problem } from "/assets/notices.js";
import { chosenDraft, draftWords, fields, form, settings } from "/assets/settings.js";
import * as state from "/assets/state.js";
import { Answer, legend } from "/assets/tokens.js";

export const title = "Race";

const STARTERS = ["Repeat the alphabet, one letter per line.", "Explain how a bicycle stays upright.", "Natalia sold 48 clips in April and half as many in May. How many in all?"];

/** Where two lists of token ids part; null if they are equal. */
function firstDifference(a, b) {
  const at = a.findIndex((id, i) => id !== b[i]);
  if (at >= 0) return at;
  return a.length === b.length ? null : a.length;
}

export function show(main) {
  let abort = null;
  let runs = [];
  let raced = null;
  let plainFirst = true;
  const input = h("textarea", { id: "prompt", rows: 2, ariaLabel: "Prompt", placeholder: "A prompt for both" });
  const together = h("input", { type: "checkbox" });
  const start = h("button", { type: "submit", class: "primary" }, "Start");
  const stop = h("button", { type: "button", class: "stop", hidden: true }, "Stop");
  const options = h("details", { class: "options" }, h("summary", {}, "Settings"), form({ withNone: false }));
  const hint = h("p", { class: "hint", role: "alert", id: "prompt-hint" });
  const setup = h("form", { class: "card stack" }, input, hint,
    h("div", { class: "starters" }, STARTERS.map((text) => h("button", { type: "button", class: "starter", onclick: () => {
      input.value = text;
      complain(input, hint, "");
      input.focus();
    } }, text))),
    h("div", { class: "row" }, h("label", { class: "check" }, together, "both at once"),
      h("span", { class: "quiet how", id: "race-how" }), stop, start), options);
  const how = setup.querySelector("#race-how");
  const lanes = { plain: lane("Without the draft"), spec: lane("With the draft") };
  const verdict = h("section", { class: "verdict", ariaLabel: "Result", hidden: true });
  const trouble = h("div");
  main.append(h("h1", {}, title), h("p", { class: "lead" }, "The same prompt with and without the draft. The text must be the same; only the time may differ."),
    setup, trouble, verdict, h("div", { class: "lanes" }, lanes.plain.node, lanes.spec.node),
    legend());

  function lane(name) {
    const clock = h("output", { class: "clock" }, "–");
    const rate = h("output", {}, "");
    const content = h("div", {}, h("p", { class: "quiet" }, "Not started"));
    const body = h("div", { class: "lane-body", tabIndex: 0, role: "group", ariaLabel: name }, content);
    const view = follow(body, content);
    const bar = h("div", { class: "progress", ariaHidden: "true" }, h("span"));
    return { name, clock, rate, content, view, bar, node: h("section", { class: "card lane", ariaLabel: name }, h("header", {}, h("h2", {}, name), h("div", { class: "lane-numbers" }, rate, clock)), bar, body, view.button) };
  }

  function explain() {
    how.textContent = together.checked
      ? "Together they share the machine: fair to each other, slower than either alone."
      : "One after the other, so that neither slows the other; who is first alternates.";
  }
  together.addEventListener("change", explain);
  explain();

  async function drive(side, prompt, draft) {
    const here = lanes[side];
    const answer = new Answer();
    here.content.replaceChildren(answer.node);
    here.view.begin();
    here.rate.textContent = "reading the prompt";
    const began = performance.now();
    const fill = here.bar.firstChild;
    const tick = () => {
      here.clock.textContent = ms(performance.now() - began);
      if (answer.text) here.rate.textContent = `${num(answer.rate())} tokens/s`;
      fill.style.width = `${Math.min(100, (answer.tokens.length / settings.max_tokens) * 100)}%`;
    };
    const ticker = setInterval(tick, 50);
    let finish = null;
    let end = null;
    try {
      end = await chat({ model: chosen() ?? state.latest()?.model ?? "default", messages: [{ role: "user", content: prompt }], ...fields(draft) }, (chunk) => {
        answer.add(chunk);
        finish = chunk.finish ?? finish;
      }, abort.signal);
      const wall = performance.now() - began;
      const decode = end.timing?.decode_ms ?? answer.lastAt - answer.firstAt;
      const rate = answer.tokens.length > 1 && decode > 0 ? ((answer.tokens.length - 1) / decode) * 1000 : null;
      here.clock.textContent = ms(wall);
      here.rate.textContent = `${num(rate)} tokens/s`;
      fill.style.width = "100%";
      return { answer, wall, decode, rate, finish, prefill: end.timing?.prefill_ms ?? null, acceptLen: end.timing?.accept_length ?? answer.acceptLen(), byServer: end.timing !== null };
    } catch (error) {
      here.rate.textContent = abort.signal.aborted ? "stopped" : "failed";
      throw error;
    } finally {
      clearInterval(ticker);
      answer.finish();
      here.view.end();
      if (answer.text) {
        keep({ where: title, prompt, messages: [{ role: "user", content: prompt }], drafting: draftWords(draft), temperature: settings.temperature,
          tokens: answer.tokens, text: answer.text, end, rate: answer.rate(), acceptLen: end?.timing?.accept_length ?? answer.acceptLen(), finish, stopped: !end });
      }
    }
  }

  async function run(prompt) {
    if (abort) return;
    abort = new AbortController();
    start.hidden = true;
    stop.hidden = false;
    trouble.replaceChildren();
    const draft = chosenDraft();
    const setting = JSON.stringify([prompt, fields(draft), together.checked]);
    if (raced !== setting) {
      runs = [];
      plainFirst = true;
      verdict.hidden = true;
      verdict.replaceChildren();
    }
    raced = setting;
    lanes.spec.node.querySelector("h2").textContent = `With the draft${draft === "auto" ? "" : `, chain of ${draft.chain}`}`;
    for (const side of Object.values(lanes)) {
      side.clock.textContent = "–";
      side.rate.textContent = "";
      side.bar.firstChild.style.width = "0";
      side.content.replaceChildren(h("p", { class: "quiet" }, "Waiting"));
      side.view.rest();
    }
    announce("The race has begun");
    const sides = { plain: () => drive("plain", prompt, "none"), spec: () => drive("spec", prompt, draft) };
    try {
      const result = { order: together.checked ? "together" : plainFirst ? "plain first" : "draft first" };
      if (together.checked) {
        [result.plain, result.spec] = await Promise.all([sides.plain(), sides.spec()]);
      } else {
        for (const side of plainFirst ? ["plain", "spec"] : ["spec", "plain"]) result[side] = await sides[side]();
        plainFirst = !plainFirst;
      }
      runs.push(result);
      judge(prompt, draft);
    } catch (error) {
      if (abort.signal.aborted) announce("Stopped");
      else trouble.replaceChildren(problem(error, () => run(prompt)));
      // The other lane of a race for two ends with this one.
      abort.abort();
    }
    abort = null;
    start.hidden = false;
    start.textContent = runs.length ? "Again" : "Start";
    stop.hidden = true;
  }

  function judge(prompt, draft) {
    const { plain, spec } = runs.at(-1);
    const ids = [plain, spec].map((side) => side.answer.tokens.map((token) => token.id));
    const traced = ids.every((list) => list.length > 0);
    const at = traced ? firstDifference(...ids) : null;
    const equal = traced ? at === null && plain.answer.text === spec.answer.text : plain.answer.text === spec.answer.text;
    const sum = (side, name) => runs.reduce((total, one) => total + one[side][name], 0);
    const perToken = (side) => sum(side, "decode") / runs.reduce((total, one) => total + one[side].answer.tokens.length - 1, 0);
    const speedup = perToken("plain") / perToken("spec");
    const equalWords = equal
      ? traced ? `Both texts are equal: ${num(ids[0].length)} tokens, compared id by id.` : "Both texts are equal, compared letter by letter."
      : traced && at !== null ? `The texts differ from token ${num(at + 1)} on. That must not happen: please report it.` : "The texts differ. That must not happen: please report it.";
    const rows = runs.map((one, i) => [String(i + 1), one.order, num(one.plain.rate), num(one.spec.rate), `${num(one.spec.rate / one.plain.rate, 2)}×`, num(one.spec.acceptLen, 2), ms(one.plain.wall), ms(one.spec.wall)]);
    verdict.replaceChildren(
      h("div", { class: "verdict-head" },
        h("div", { class: "tile-value" }, `${num(speedup, 2)}×`),
        h("div", {}, h("p", { class: "verdict-text" }, speedup >= 1.02 ? "as fast with the draft as without" : speedup > 0.98 ? "the same speed with and without" : "slower with the draft here"),
          h("p", { class: equal ? "same" : "differs", id: "equal" }, h("span", { ariaHidden: "true" }, equal ? "✓ " : "✗ "), equalWords))),
      h("p", { class: "quiet asked" }, "Prompt: ", prompt),
      table(["run", "order", "plain tokens/s", "draft tokens/s", "speedup", "accept length", "plain, in all", "draft, in all"], rows, ["r", "", "r", "r", "r", "r", "r", "r"]),
      h("p", { class: "quiet" }, `Decode time per token, without the draft ÷ with it${runs.length > 1 ? `, over ${runs.length} runs` : ""}${plain.byServer ? "; times by the server" : "; times by this browser"}; ${draftWords(draft)}. A race is a glance: `, h("code", {}, "draftsmith bench"), " measures with intervals."));
    verdict.classList.toggle("slower", speedup < 1 || !equal);
    verdict.hidden = false;
    verdict.scrollIntoView({ block: "nearest" });
    announce(`${num(speedup, 2)} times. ${equalWords}`);
  }

  setup.addEventListener("submit", (event) => {
    event.preventDefault();
    const prompt = input.value.trim();
    complain(input, hint, prompt ? "" : "There is nothing to race with yet: write a prompt first.");
    if (prompt) run(prompt);
  });
  input.addEventListener("input", () => complain(input, hint, ""));
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.ctrlKey && !event.metaKey && !event.isComposing) {
      event.preventDefault();
      setup.requestSubmit();
    }
  });
  stop.addEventListener("click", () => abort?.abort());
  const leave = keys({ send: () => setup.requestSubmit(), stop: () => abort?.abort() });
  return () => {
    abort?.abort();
    for (const side of Object.values(lanes)) side.view.stop();
    leave();
  };
}
