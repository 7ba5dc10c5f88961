// What went wrong, in words, and the dialog for the API key.

import { ApiError, key, setKey } from "/assets/api.js";
import { h } from "/assets/dom.js";

/** An error as a box: what, why, what to do; with a button if `retry` is given. */
export function problem(error, retry) {
  const known = error instanceof ApiError;
  const ask = known && (error.status === 401 || error.status === 403);
  return h("div", { class: "problem", role: "alert" },
    h("strong", {}, known ? error.title : "Something in this page failed"),
    h("p", {}, error.message),
    known && error.hint ? h("p", { class: "quiet" }, error.hint) : null,
    ask || retry ? h("div", { class: "row" },
      ask ? h("button", { type: "button", onclick: openKey }, "Enter API key") : null,
      retry ? h("button", { type: "button", onclick: retry }, "Try again") : null) : null);
}

const dialog = document.getElementById("key-dialog");
const keyInput = document.getElementById("key-input");
/** Asks for the key. */
export function openKey() {
  keyInput.value = key();
  dialog.showModal();
  keyInput.select();
}
document.getElementById("key-button").addEventListener("click", openKey);
document.getElementById("key-forget").addEventListener("click", () => {
  setKey("");
  dialog.close();
});
dialog.querySelector("form").addEventListener("submit", () => setKey(keyInput.value.trim()));
