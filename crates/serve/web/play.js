// Playground: a chat in which every token shows how it was made.

import { chat } from "/assets/api.js";
import { announce, h, ms, num, percent } from "/assets/dom.js";
import { follow } from "/assets/follow.js";
import { keep } from "/assets/journal.js";
import { chosen } from "/assets/model.js";
import { complain, keys, problem } from "/assets/notices.js";
import { draftWords, fields, form, settings } from "/assets/settings.js";
import * as state from "/assets/state.js";
import { Answer, legend } from "/assets/tokens.js";

export const title = "Playground";

const STARTERS = [
  "Why is the sky blue?",
  "Write a Python function that tells whether a number is prime.",
  "A train travels 60 km in 45 minutes. How fast is it in km/h?",
];

// The conversation outlives a visit to another page; it is gone with the tab.
const turns = [];
let system = "";

/** Begins anew: the next message is the first. */
export function begin() {
  turns.length = 0;
}

export function show(main) {
  const log = h("div", { class: "log", role: "log", ariaLive: "off", ariaLabel: "Conversation" });
  const input = h("textarea", { id: "prompt", rows: 2, placeholder: "Write a message", ariaLabel: "Message", enterKeyHint: "send" });
  const send = h("button", { type: "submit", class: "primary" }, "Send");
  const stop = h("button", { type: "button", class: "stop", hidden: true }, "Stop");
  const clear = h("button", { type: "button", class: "ghost", hidden: true }, "New chat");
  const hint = h("p", { class: "hint", role: "alert", id: "prompt-hint" });
  const view = follow(null, log);
  const composer = h("form", { class: "composer" }, view.button, input, hint,
    h("div", { class: "row" }, h("span", { class: "quiet keys-hint" }, h("kbd", {}, "Enter"), " or ", h("kbd", {}, "Ctrl Enter"), " sends, ", h("kbd", {}, "Shift Enter"), " new line, ", h("kbd", {}, "Esc"), " stops"),
      h("span", { class: "grow" }), clear, stop, send));
  const accept = h("output", { class: "meter-value" }, "–");
  const rate = h("output", { class: "meter-value" }, "–");
  const count = h("output", { class: "meter-value" }, "–");
  const meters = h("section", { class: "meters", ariaLabel: "This answer" },
    h("div", { dataset: { tip: "Tokens committed per verify step, the target's own included: near one, the draft did not help" } }, h("span", {}, "accept length"), accept),
    h("div", { dataset: { tip: "Decode time only, without reading the prompt" } }, h("span", {}, "tokens/s"), rate),
    h("div", {}, h("span", {}, "tokens"), count));
  const systemInput = h("textarea", { rows: 2, value: system, placeholder: "none", oninput: (event) => (system = event.target.value) });
  const options = h("details", { class: "card options" }, h("summary", {}, "Settings"), form(),
    h("label", { class: "field" }, h("span", {}, "System message"), systemInput));
  options.open = matchMedia("(min-width: 900px)").matches;
  const side = h("aside", { class: "side", ariaLabel: "Measures and settings" }, meters,
    h("section", { class: "card" }, h("h2", {}, "How tokens were made"), legend()), options);
  main.append(h("h1", { class: "sr" }, title), h("div", { class: "chat" }, log, composer), side);

  let abort = null;

  function welcome() {
    const now = state.latest();
    return h("div", { class: "welcome" },
      h("h2", {}, now ? `Chat with ${now.model}` : "Chat with the model"),
      h("p", { class: "quiet" }, state.asleep()
        ? "This model is not loaded yet: the first message loads it, which takes a moment."
        : now && !now.has_draft
        ? "The server has no draft: every token is decoded by the target alone."
        : "A small draft guesses ahead, the model checks. What it would not have written itself is put right, so the text is the same with and without the draft."),
      h("div", { class: "starters" }, STARTERS.map((text) => h("button", { type: "button", class: "starter", onclick: () => submit(text) }, text))));
  }

  function render() {
    log.replaceChildren(...(turns.length ? turns.map((turn) => turn.node) : [welcome()]));
    clear.hidden = !turns.length || abort !== null;
  }

  function meter(answer, end = null) {
    const length = end?.timing?.accept_length ?? answer.acceptLen();
    accept.textContent = num(length, 2);
    const measured = end?.timing?.decode_ms && answer.tokens.length > 1 ? ((answer.tokens.length - 1) / end.timing.decode_ms) * 1000 : answer.rate();
    rate.textContent = num(measured);
    count.textContent = num(answer.tokens.length);
    return { length, rate: measured };
  }

  async function submit(text) {
    text = text.trim();
    if (abort) return;
    if (!text) return complain(input, hint, "There is nothing to send yet: write a message first.");
    input.value = "";
    complain(input, hint, "");
    grow();
    const answer = new Answer();
    const user = { role: "user", content: text, node: h("article", { class: "turn user" }, h("h3", { class: "who" }, "You"), h("div", { class: "bubble" }, text)) };
    const foot = h("footer", { class: "foot" }, h("span", { class: "waiting" }, "reading the prompt"));
    const reply = { role: "assistant", content: "", node: h("article", { class: "turn model", ariaBusy: "true" }, h("h3", { class: "who" }, "Model"), answer.node, foot) };
    const history = [...(system.trim() ? [{ role: "system", content: system.trim() }] : []),
      ...turns.filter((turn) => turn.content && !turn.failed).map(({ role, content }) => ({ role, content })), { role: "user", content: text }];
    turns.push(user, reply);
    abort = new AbortController();
    send.hidden = true;
    stop.hidden = false;
    render();
    view.begin();
    announce("The model is answering");
    meter(answer);
    const words = draftWords();
    let finish = null;
    let end = null;
    let failed = null;
    let stopped = false;
    const ticker = setInterval(() => {
      meter(answer);
      if (answer.text) foot.replaceChildren();
    }, 120);
    try {
      end = await chat({ model: chosen() ?? state.latest()?.model ?? "default", messages: history, ...fields() }, (chunk) => {
        answer.add(chunk);
        finish = chunk.finish ?? finish;
      }, abort.signal);
    } catch (error) {
      stopped = abort.signal.aborted;
      failed = stopped ? null : error;
    }
    clearInterval(ticker);
    const matched = answer.finish();
    const last = meter(answer, end);
    reply.content = answer.text;
    reply.node.ariaBusy = "false";
    // A question without an answer is not sent again with the next one.
    if (failed && !answer.text) user.failed = reply.failed = true;
    answer.node.hidden = failed !== null && !answer.text;
    foot.replaceChildren(...(answer.node.hidden ? [] : footer(answer, { end, finish, stopped, matched, words, last })));
    if (failed) foot.append(problem(failed, answer.text ? null : () => {
      turns.splice(turns.indexOf(user), 2);
      abort = null;
      submit(text);
    }));
    abort = null;
    send.hidden = false;
    stop.hidden = true;
    clear.hidden = false;
    if (answer.text) {
      keep({ where: title, prompt: text, messages: history, drafting: words, temperature: settings.temperature, tokens: answer.tokens, text: answer.text,
        end, rate: last.rate, acceptLen: last.length, finish, stopped });
    }
    view.end();
    // The box of a failure announces itself.
    announce(failed ? "" : `${stopped ? "Stopped" : "Answer complete"}. ${answer.sentence()}. ${answer.text}`);
    if (document.activeElement === document.body || document.activeElement === stop) input.focus({ preventScroll: true });
  }

  function footer(answer, { end, finish, stopped, matched, words, last }) {
    const bits = [];
    if (answer.tokens.length) bits.push(answer.sentence());
    if (end?.metrics?.num_draft_tokens) bits.push(`${percent(end.metrics.draft_acceptance_rate, 0)} of ${num(end.metrics.num_draft_tokens)} guesses accepted`);
    if (last.length) bits.push(`accept length ${num(last.length, 2)}`);
    if (last.rate) bits.push(`${num(last.rate)} tokens/s`);
    if (end?.timing?.prefill_ms !== undefined) bits.push(`prompt read in ${ms(end.timing.prefill_ms)}`);
    bits.push(words);
    if (stopped) bits.push("stopped by you");
    else if (finish === "length") bits.push("cut at the longest answer");
    return [
      answer.tokens.length ? answer.shares() : null,
      h("p", { class: "quiet" }, bits.join(" · ")),
      matched ? null : h("p", { class: "quiet" }, "Tokens and text could not be matched; the text is shown without colours."),
      answer.tokens.length ? answer.list() : null,
    ].filter(Boolean);
  }

  function grow() {
    input.style.height = "auto";
    input.style.height = `${Math.min(input.scrollHeight + 2, 200)}px`;
  }

  input.addEventListener("input", () => {
    complain(input, hint, "");
    grow();
  });
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.ctrlKey && !event.metaKey && !event.isComposing) {
      event.preventDefault();
      submit(input.value);
    }
  });
  composer.addEventListener("submit", (event) => {
    event.preventDefault();
    submit(input.value);
  });
  stop.addEventListener("click", () => abort?.abort());
  const leave = keys({ send: () => submit(input.value), stop: () => abort?.abort() });
  clear.addEventListener("click", () => {
    begin();
    view.rest();
    render();
    for (const meterValue of [accept, rate, count]) meterValue.textContent = "–";
    input.focus();
  });
  const unsubscribe = state.subscribe(() => {
    if (!turns.length) render();
  });
  render();
  if (matchMedia("(hover: hover)").matches) input.focus({ preventScroll: true });
  return () => {
    abort?.abort();
    unsubscribe();
    view.stop();
    leave();
  };
}
