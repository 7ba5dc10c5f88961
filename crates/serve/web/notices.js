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

/** Says what is wrong with a field beside it, or takes that back. */
export function complain(input, hint, text) {
  if (hint.textContent === text && text) hint.textContent = "";
  hint.textContent = text;
  input.toggleAttribute("aria-invalid", Boolean(text));
  if (text) {
    input.setAttribute("aria-describedby", hint.id);
    input.focus();
  } else {
    input.removeAttribute("aria-describedby");
  }
}

/** Ctrl Enter (or Cmd Enter) sends and Escape stops, wherever in the page one is; gives a function that ends that. */
export function keys({ send, stop }) {
  const listen = (event) => {
    if (document.querySelector("dialog[open]")) return;
    if (event.key === "Escape") stop();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !event.isComposing) {
      event.preventDefault();
      send();
    }
  };
  document.addEventListener("keydown", listen);
  return () => document.removeEventListener("keydown", listen);
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
