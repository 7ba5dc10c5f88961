// Which of the server's models the page speaks of. A server of one model has nothing to choose.

import { announce, h } from "/assets/dom.js";
import { choose, chosen } from "/assets/model.js";
import * as state from "/assets/state.js";

const WORDS = { "not loaded": "loaded when asked", failed: "cannot be loaded", unloading: "makes room" };

/** Keeps the list of models in the header as the server has it; `changed()` is called when another one is chosen. */
export function chooser(changed) {
  const select = h("select", { id: "model-choice", ariaLabel: "Model" });
  const node = h("span", { class: "models", hidden: true }, select);
  let shown = "";
  select.addEventListener("change", () => {
    choose(select.value);
    announce(`Model: ${select.value}`);
    state.forget();
    state.refresh();
    changed();
  });
  state.subscribe(() => {
    const models = state.latest()?.models ?? [];
    node.hidden = models.length < 2;
    const now = JSON.stringify([models, chosen()]);
    // Rebuilt only when something changed: an open list stays open.
    if (now === shown) return;
    shown = now;
    select.replaceChildren(...models.map(({ id, state: how, error }) =>
      h("option", { value: id, selected: id === chosen(), title: error ?? "" }, WORDS[how] ? `${id} (${WORDS[how]})` : id)));
  });
  return node;
}
