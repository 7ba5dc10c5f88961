// The chosen model of a server that has several, for this tab.

const KEPT = "draftsmith.model";

/** Its name, or null: the one that was used last. */
export const chosen = () => sessionStorage.getItem(KEPT);

export function choose(name) {
  if (name === null) sessionStorage.removeItem(KEPT);
  else sessionStorage.setItem(KEPT, name);
}

/** A path of the API, of the chosen model. */
export const ofModel = (path) => (chosen() === null ? path : `${path}?model=${encodeURIComponent(chosen())}`);
