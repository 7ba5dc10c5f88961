// The frame: which page is shown (the part of the address after #), theme, key, the state of the server.

import { announce, empty, h } from "/assets/dom.js";
import "/assets/notices.js";
import * as state from "/assets/state.js";
import * as bundle from "/assets/bundle.js";
import * as generations from "/assets/generations.js";
import * as live from "/assets/live.js";
import { chooser } from "/assets/models.js";
import * as play from "/assets/play.js";
import * as race from "/assets/race.js";
import * as records from "/assets/records.js";
import * as runs from "/assets/runs.js";

// Each page: title, and `show(main, rest)`, which fills the page and may return what to call when it is left.
const PAGES = { play, race, generations, runs, bundle, records, live };
const main = document.getElementById("main");
let leave = null;

async function route() {
  const hash = location.hash;
  if (hash === "#main") return;
  const [name, ...rest] = hash.replace(/^#\/?/, "").split("/");
  const page = PAGES[name] ?? (name === "" ? play : null);
  leave?.();
  leave = null;
  main.replaceChildren();
  main.className = `page-${page ? name || "play" : "none"}`;
  for (const link of document.querySelectorAll(".tabs a")) {
    const current = link.getAttribute("href") === `#/${name || "play"}`;
    if (current) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
    if (current) link.scrollIntoView({ block: "nearest", inline: "nearest" });
  }
  document.title = page ? `${page.title} · draftsmith` : "draftsmith";
  if (!page) {
    main.append(empty("No such page", "The address names a page that is not here.", h("a", { class: "button", href: "#/play" }, "Playground")));
    return;
  }
  leave = page.show(main, rest.map(decodeURIComponent)) ?? null;
}

window.addEventListener("hashchange", () => {
  route();
  if (location.hash !== "#main") {
    scrollTo(0, 0);
    announce(document.title);
  }
});

document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  main.focus();
});

// Theme: system, light, dark, in turn.
const themeButton = document.getElementById("theme-button");
const theme = () => document.documentElement.dataset.theme ?? "system";
function labelTheme() {
  themeButton.title = `Theme: ${theme()}`;
  themeButton.ariaLabel = `Theme: ${theme()}. Change`;
}
themeButton.addEventListener("click", () => {
  const next = { system: "light", light: "dark", dark: "system" }[theme()];
  if (next === "system") {
    delete document.documentElement.dataset.theme;
    localStorage.removeItem("draftsmith.theme");
  } else {
    document.documentElement.dataset.theme = next;
    localStorage.setItem("draftsmith.theme", next);
  }
  labelTheme();
  announce(`Theme: ${next}`);
});
labelTheme();

// The pill: is the server there, with what.
const pill = document.getElementById("pill");
const pillText = document.getElementById("pill-text");
// A conversation is with one model; a page that shows another's is shown anew.
pill.before(chooser(() => {
  play.begin();
  route();
}));
state.subscribe(() => {
  const now = state.latest();
  const failed = state.problem;
  pill.dataset.state = failed ? "off" : now?.has_draft ? "on" : "plain";
  if (failed) pillText.textContent = failed.code === "loading" ? "loading" : failed.status === 401 ? "key needed" : "no answer";
  else if (now.models?.length > 1) pillText.textContent = state.asleep() ?? (now.has_draft ? "with a draft" : "no draft");
  else pillText.textContent = now.has_draft ? now.model : `${now.model}, no draft`;
  pill.title = failed ? failed.message : state.asleep() ? `${now.model}: ${state.asleep()}` : now.has_draft ? `${now.model}, with the draft ${now.draft?.name ?? ""}` : `${now.model} without a draft`;
});

// One tip for everything with data-tip: pointer, touch and keyboard focus.
const tip = document.getElementById("tip");
function showTip(event) {
  const target = event.target instanceof Element ? event.target.closest("[data-tip]") : null;
  if (!target) {
    tip.hidden = true;
    return;
  }
  tip.textContent = target.dataset.tip;
  tip.hidden = false;
  const box = target.getClientRects()[0] ?? target.getBoundingClientRect();
  const half = tip.offsetWidth / 2;
  const middle = box.left + box.width / 2;
  tip.style.left = `${Math.max(8, Math.min(innerWidth - 2 * half - 8, middle - half))}px`;
  const above = box.top - tip.offsetHeight - 8;
  tip.style.top = `${above > 0 ? above : box.bottom + 8}px`;
}
for (const name of ["pointerover", "focusin"]) document.addEventListener(name, showTip);
document.addEventListener("scroll", () => (tip.hidden = true), { capture: true, passive: true });

state.refresh();
route();
