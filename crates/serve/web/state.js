// What the server is doing: `/api/state`, asked for as long as the page is seen, and kept for three minutes.

import { get } from "/assets/api.js";
import { choose, chosen, ofModel } from "/assets/model.js";

const KEPT_MS = 180_000;
const listeners = new Set();
let everyMs = 3000;
let timer = null;

/** `{ at, state }`, oldest first; `state` is null where the server did not answer. */
export const history = [];
/** The error of the last try, or null. */
export let problem = null;

/** The last state that the server told, or null. */
export const latest = () => history.findLast((entry) => entry.state)?.state ?? null;

/** Why the shown model, one of several, does not answer at once, or null: `not loaded`, `failed`, `unloading`. */
export function asleep() {
  const now = latest();
  const how = now?.models?.find(({ id }) => id === now.model)?.state;
  return how === undefined || how === "loaded" ? null : how;
}

/** Calls `listener` after every try; gives a function that ends that. */
export function subscribe(listener) {
  listeners.add(listener);
  return () => listeners.delete(listener);
}

/** What was told so far was of another model. */
export function forget() {
  history.length = 0;
}

/** How often to ask. */
export function setPace(ms) {
  everyMs = ms;
  refresh();
}

/** Asks now. */
export async function refresh() {
  clearTimeout(timer);
  timer = null;
  const at = Date.now();
  const asked = chosen();
  try {
    const state = await get(ofModel("/api/state"));
    if (asked !== chosen()) return;
    // From now on it is this one, whichever others use.
    if (state.models && asked === null) choose(state.model);
    problem = null;
    history.push({ at, state });
  } catch (error) {
    if (asked !== chosen()) return;
    // The server was started anew with other models.
    if (error.status === 404 && asked !== null) {
      choose(null);
      return refresh();
    }
    problem = error;
    history.push({ at, state: null });
  }
  while (history.length && history[0].at < at - KEPT_MS) history.shift();
  for (const listener of listeners) listener();
  if (timer === null && !document.hidden) timer = setTimeout(refresh, everyMs);
}

document.addEventListener("visibilitychange", () => {
  if (!document.hidden) refresh();
});
document.addEventListener("key-changed", refresh);
