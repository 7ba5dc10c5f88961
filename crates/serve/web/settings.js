// How answers are made: temperature, seed, length, drafting. Kept in this browser; used by the playground and the race.

import { h } from "/assets/dom.js";

const KEPT = "draftsmith.settings";
const DEFAULTS = { temperature: 0, seed: 0, max_tokens: 256, draft: "auto", chain: 5 };

function load() {
  try {
    return { ...DEFAULTS, ...JSON.parse(localStorage.getItem(KEPT) ?? "{}") };
  } catch {
    return { ...DEFAULTS };
  }
}

export const settings = load();

function set(name, value) {
  settings[name] = value;
  localStorage.setItem(KEPT, JSON.stringify(settings));
}

/** The fields of a request that these settings make; `draft`: in place of the chosen one. */
export function fields(draft = chosenDraft()) {
  return {
    temperature: settings.temperature,
    seed: settings.seed,
    max_tokens: settings.max_tokens,
    draftsmith: { draft, trace: true },
  };
}

/** The chosen drafting as the API wants it. */
export const chosenDraft = () => (settings.draft === "chain" ? { chain: settings.chain } : settings.draft);

/** The chosen drafting in words. */
export const draftWords = (draft = chosenDraft()) =>
  draft === "auto" ? "draft: as much as pays" : draft === "none" ? "no draft" : `draft: chain of ${draft.chain}`;

function number(name, label, min, max, step, hint) {
  const input = h("input", { type: "number", min, max, step, value: settings[name], id: `set-${name}`, inputMode: step < 1 ? "decimal" : "numeric" });
  const check = () => {
    const value = input.valueAsNumber;
    const good = Number.isFinite(value) && value >= min && value <= max && (step < 1 || Number.isInteger(value));
    input.setCustomValidity(good ? "" : `${label}: ${min} to ${max}`);
    input.toggleAttribute("aria-invalid", !good);
    if (good) set(name, value);
    return good;
  };
  input.addEventListener("input", check);
  // What is not a value is not sent: back to the last good one.
  input.addEventListener("change", () => {
    if (!check()) {
      input.value = settings[name];
      check();
    }
  });
  return h("label", { class: "field" }, h("span", {}, label), input, hint ? h("small", {}, hint) : null);
}

/** The form. `withNone`: offer to draft nothing. */
export function form({ withNone = true } = {}) {
  const chain = number("chain", "Chain of", 1, 16, 1, "guesses per step");
  const options = [["auto", "as much as pays"], ["chain", "a chain of fixed length"], ...(withNone ? [["none", "no draft"]] : [])];
  if (!withNone && settings.draft === "none") set("draft", "auto");
  const select = h("select", { id: "set-draft" }, options.map(([value, text]) => h("option", { value, selected: value === settings.draft }, text)));
  const show = () => (chain.hidden = select.value !== "chain");
  select.addEventListener("change", () => {
    set("draft", select.value);
    show();
  });
  show();
  return h("div", { class: "settings" },
    h("label", { class: "field" }, h("span", {}, "Drafting"), select),
    chain,
    number("temperature", "Temperature", 0, 2, 0.1, "0: the likeliest token"),
    number("seed", "Seed", 0, 2 ** 32 - 1, 1, "same seed, same text"),
    number("max_tokens", "Longest answer", 1, 4096, 1, "tokens"));
}
