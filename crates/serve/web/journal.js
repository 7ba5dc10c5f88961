// What was generated in this tab: the newest first, kept in memory and gone with the tab.

const MOST = 60;
const listeners = new Set();
let next = 1;

/**
 * `{ id, at, where, prompt, messages, drafting, temperature, tokens, text, end, finish, stopped }`: `tokens` as the server
 * traced them, `end` what its last event said.
 */
export const entries = [];

/** Keeps one. */
export function keep(entry) {
  entries.unshift({ id: next++, at: Date.now(), ...entry });
  entries.length = Math.min(entries.length, MOST);
  for (const listener of listeners) listener();
}

/** Calls `listener` for each that is kept; gives a function that ends that. */
export function subscribe(listener) {
  listeners.add(listener);
  return () => listeners.delete(listener);
}

/**
 * The verify steps of an answer: `[{ tokens, drafted }]`, without the first token, which the prompt's own pass gave. A step
 * ends with the target's own token; the last one of a cut answer may end with a drafted one.
 */
export function steps(tokens) {
  const all = [];
  let open = [];
  for (const token of tokens.slice(1)) {
    open.push(token);
    if (token.origin === "draft") continue;
    all.push({ tokens: open, drafted: open.length - 1 });
    open = [];
  }
  if (open.length) all.push({ tokens: open, drafted: open.length });
  return all;
}

/** Committed tokens per verify step; null before the first. */
export function acceptLen(tokens) {
  const count = steps(tokens).length;
  return count ? (tokens.length - 1) / count : null;
}
