// Drives the page of `draftsmith serve` in a headless Chromium: types, sends, watches the tokens get their colours, the code
// its letters and the view its end, stops, switches the draft off, races, opens generations, the bundle, a record and a run
// whose log it writes meanwhile; wide and narrow, light and dark.
//
//   npm install && node drive.mjs http://127.0.0.1:8080 [--runs DIR] [--shots DIR] [--key KEY] [--chromium PATH]
//
// The server needs a bundle; `--runs` is the folder that it was given by the same option, and gets a run `page-check` for as
// long as this works. Ends with 1 at the first expectation that does not hold.

import { appendFileSync, cpSync, mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { chromium } from "playwright-core";

const { values: options, positionals } = parseArgs({
  allowPositionals: true,
  options: { runs: { type: "string" }, shots: { type: "string" }, key: { type: "string" }, chromium: { type: "string", default: "/usr/bin/chromium" } },
});
const base = positionals[0];
if (!base) {
  console.error("error: no address of a server\nhint: node drive.mjs http://127.0.0.1:8080");
  process.exit(2);
}
if (options.shots) mkdirSync(options.shots, { recursive: true });

let checks = 0;
function expect(holds, what) {
  if (!holds) throw new Error(`expected: ${what}`);
  checks += 1;
  console.log(`ok  ${what}`);
}

const profile = mkdtempSync(join(tmpdir(), "drive-"));
const context = await chromium.launchPersistentContext(profile, {
  executablePath: options.chromium,
  viewport: { width: 1280, height: 860 },
  args: ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"],
});
context.setDefaultTimeout(60_000);
const page = context.pages()[0] ?? (await context.newPage());
const complaints = [];
page.on("pageerror", (error) => complaints.push(String(error)));
page.on("console", (message) => {
  // A refused request is logged by the browser; the page shows it in words, and that is what is looked at.
  if (message.type() === "error" && !/Failed to load resource/.test(message.text())) complaints.push(message.text());
});
const asked = [];
page.on("request", (request) => asked.push(request.url()));

const shot = async (name, fullPage = false) => {
  if (options.shots) await page.screenshot({ path: join(options.shots, `${name}.png`), fullPage });
};
const open = async (hash) => {
  await page.goto(`${base}/#/${hash}`);
  await page.waitForFunction(() => !document.querySelector(".loading"));
};
const fits = () => page.evaluate(() => document.documentElement.scrollWidth <= innerWidth);
const answered = () => page.waitForSelector(".turn.model:last-child[aria-busy=false]", { timeout: 120_000 });
const origins = () => page.$$eval(".turn.model:last-child .tok", (all) => all.map((one) => one.dataset.origin));
async function set(label, value) {
  await page.evaluate(() => document.querySelector("details.options").setAttribute("open", ""));
  const field = page.getByLabel(label);
  if ((await field.evaluate((node) => node.tagName)) === "SELECT") await field.selectOption(value);
  else await field.fill(value);
}

async function playground() {
  await open("play");
  if (options.key) {
    await page.getByRole("button", { name: "API key" }).click();
    await page.getByLabel("Key", { exact: true }).fill(options.key);
    await page.getByRole("button", { name: "Save" }).click();
  }
  await page.waitForSelector(".pill[data-state=on]");
  expect(await page.getByText("Chat with").isVisible(), "the empty playground says what it is");
  await shot("play-empty");
  await set("Longest answer", "96");
  await set("Drafting", "chain");
  await page.getByLabel("Message", { exact: true }).fill("Why is the sky blue?");
  await page.keyboard.press("Enter");
  await answered();
  const made = await origins();
  expect(made.includes("draft"), "an answer with the draft has drafted tokens");
  expect(made.includes("recovered") || made.includes("bonus"), "and corrected or bonus ones");
  const marks = await page.$$eval(".turn.model:last-child .tok", (all) => {
    const styles = {};
    for (const one of all) {
      const style = getComputedStyle(one);
      styles[one.dataset.origin] = `${style.backgroundColor} ${style.textDecorationStyle} ${style.textDecorationColor}`;
    }
    return styles;
  });
  expect(new Set(Object.values(marks)).size === Object.keys(marks).length, "every way of making a token looks different");
  const shown = await page.$eval(".turn.model:last-child .answer", (node) => node.textContent);
  expect(shown.trim().length > 20, "the answer has text");
  expect(Number(await page.$eval(".meter-value", (node) => node.textContent)) >= 1, "the accept length is shown");
  await shot("play-answer");
  await page.getByText("Tokens one by one").click();
  await page.waitForSelector(".turn.model:last-child tbody tr");
  const counted = Number(await page.locator(".meter-value").last().textContent());
  expect((await page.$$(".turn.model:last-child tbody tr")).length === counted, "every token stands in the list for screen readers");
  await page.getByText("Tokens one by one").click();

  await set("Drafting", "none");
  await page.getByLabel("Message", { exact: true }).fill("Name three colours.");
  await page.keyboard.press("Enter");
  await answered();
  expect((await origins()).every((origin) => origin === "plain"), "without the draft every token is plain");
  await shot("play-no-draft");

  await set("Longest answer", "1000");
  for (const [way, stop] of [["Esc", () => page.keyboard.press("Escape")], ["the button", () => page.getByRole("button", { name: "Stop" }).click()]]) {
    await page.getByRole("button", { name: "New chat" }).click();
    await page.getByLabel("Message", { exact: true }).fill("Write a long story about a lighthouse.");
    await page.keyboard.press("Enter");
    await page.waitForFunction(() => document.querySelectorAll(".turn.model:last-child .tok").length > 3);
    await stop();
    await answered();
    expect(await page.locator(".turn.model").last().getByText("stopped by you").isVisible(), `${way} stops an answer`);
  }
  await page.getByRole("button", { name: "New chat" }).click();
  expect((await page.$$(".turn")).length === 0, "a new chat is empty");
  await set("Drafting", "auto");
  await set("Longest answer", "96");
}

async function errors() {
  await open("play");
  await page.route("**/v1/chat/completions", (route) =>
    route.fulfill({ status: 429, contentType: "application/json", body: JSON.stringify({ error: { message: "16 requests wait already", code: "overloaded" } }) }));
  await page.getByLabel("Message", { exact: true }).fill("Are you there?");
  await page.keyboard.press("Enter");
  await page.waitForSelector(".problem");
  expect(await page.locator(".problem").getByText("The server is busy").isVisible(), "a refused request is told in words");
  await shot("play-error");
  await page.unroute("**/v1/chat/completions");
  await page.getByRole("button", { name: "Try again" }).click();
  await answered();
  expect((await page.$$(".problem")).length === 0, "trying again works");
  await page.getByRole("button", { name: "New chat" }).click();
  // Markup in an answer stays text; tokens that share a character do not break it.
  const nasty = "<img src=x onerror=alert(1)><b>bold</b> \u{1F30D}!";
  const tokens = [nasty.slice(0, -3), "\uFFFD", "\uFFFD", "!"].map((text, id) => ({ id, text, origin: id === 1 ? "recovered" : "draft" }));
  await page.route("**/v1/chat/completions", (route) => route.fulfill({ contentType: "text/event-stream", body:
    `data: ${JSON.stringify({ choices: [{ index: 0, delta: { content: nasty }, finish_reason: "stop" }], draftsmith: { tokens } })}\n\ndata: [DONE]\n\n` }));
  await page.getByLabel("Message", { exact: true }).fill("Markup?");
  await page.keyboard.press("Enter");
  await answered();
  expect((await page.$eval(".turn.model .answer", (node) => node.textContent)) === nasty, "markup in an answer stays text");
  expect((await page.$$(".answer img, .answer b")).length === 0, "and makes no elements");
  expect((await page.$eval(".tok.recovered", (node) => node.textContent)) === "\u{1F30D}", "a character of two tokens is shown whole, with the mark of the first");
  await page.unroute("**/v1/chat/completions");
  await page.getByRole("button", { name: "New chat" }).click();
}

/** An answer of our own in place of the server's. */
async function served(text, then) {
  const tokens = text.match(/\s*[A-Za-z0-9_]+|\s*[^A-Za-z0-9_]/g).map((piece, id) => ({ id, text: piece, origin: ["draft", "draft", "bonus", "recovered"][id % 4] }));
  await page.route("**/v1/chat/completions", (route) => route.fulfill({ contentType: "text/event-stream", body:
    `data: ${JSON.stringify({ choices: [{ index: 0, delta: { content: text }, finish_reason: "stop" }], draftsmith: { tokens } })}\n\ndata: [DONE]\n\n` }));
  await page.getByLabel("Message", { exact: true }).fill("Code?");
  await page.keyboard.press("Control+Enter");
  await answered();
  await then();
  await page.unroute("**/v1/chat/completions");
  await page.getByRole("button", { name: "New chat" }).click();
}

async function code() {
  await open("play");
  const text = "Use `is_prime(7)` or:\n\n```python\ndef f(x):\n    return x * 2  # <b>\n```\n\nand ``a ` b``, but ` alone stays.\n~~~\nlast\n";
  await served(text, async () => {
    expect((await page.$eval(".turn.model .answer", (node) => node.textContent)) === text, "an answer with code has every letter");
    const blocks = await page.$$eval(".answer .code pre code", (all) => all.map((one) => one.textContent));
    expect(JSON.stringify(blocks) === JSON.stringify(["def f(x):\n    return x * 2  # <b>\n", "last\n"]), `fenced blocks are code ${JSON.stringify(blocks)}`);
    const inline = await page.$$eval(".answer > code", (all) => all.map((one) => one.textContent));
    expect(JSON.stringify(inline) === JSON.stringify(["`is_prime(7)`", "``a ` b``"]), `so is what stands between backticks ${JSON.stringify(inline)}`);
    const fonts = await page.$$eval(".answer > code, .answer .code pre code", (all) => all.map((one) => getComputedStyle(one).fontFamily));
    expect(fonts.every((font) => /monospace$/.test(font)), "all of it in a monospaced face");
    expect((await page.$$(".answer .code .tok.draft")).length > 0 && (await page.$$(".answer b")).length === 0, "its tokens keep their marks, and its markup stays text");
    await shot("play-code");
  });
  // However the text is cut into pieces, the same comes out.
  const different = await page.evaluate(async () => {
    const { Paper } = await import("/assets/code.js");
    const whole = (text, cuts) => {
      const node = document.createElement("div");
      const paper = new Paper(node);
      let from = 0;
      for (const to of [...cuts, text.length]) {
        paper.write(text.slice(from, to), (part) => [part]);
        from = to;
      }
      const before = node.textContent;
      paper.end();
      node.normalize();
      return { shape: [...node.childNodes].map(function shape(one) { return one.nodeType === 3 ? one.data : one.nodeName + one.className + (one.nodeName === "BUTTON" ? "" : `(${[...one.childNodes].map(shape).join("|")})`); }).join("|"), before, after: node.textContent };
    };
    let seed = 7;
    const random = (n) => (seed = (seed * 48271) % 2147483647) % n;
    const bits = ["`", "``", "```", "~~~", "\n", "\n\n", " ", "    ", "a", "word", "```py\n", "\n```\n", "<b>", "é", "\u{1F30D}", "* ", "`x`", "`````"];
    for (let round = 0; round < 3000; round++) {
      const text = Array.from({ length: 1 + random(14) }, () => bits[random(bits.length)]).join("");
      const cuts = Array.from({ length: random(8) }, () => random(text.length + 1)).sort((a, b) => a - b);
      const [one, other] = [whole(text, []), whole(text, cuts)];
      if (one.shape !== other.shape || other.after !== text || other.before !== text) return JSON.stringify([text, cuts, one, other]);
    }
    return null;
  });
  expect(different === null, `an answer looks the same however it comes in pieces ${different ?? ""}`);
}

async function view() {
  await open("play");
  const message = page.getByLabel("Message", { exact: true });
  await message.fill("   ");
  await page.getByRole("button", { name: "Send" }).click();
  expect(await page.getByText("There is nothing to send yet").isVisible(), "an empty message says so");
  expect((await page.$$(".turn")).length === 0, "and sends nothing");
  await message.fill("W");
  expect((await page.$eval("#prompt-hint", (node) => node.textContent)) === "", "the hint goes when something is typed");
  await set("Longest answer", "1200");
  await message.fill("Write a very long story about a lighthouse, its keeper and the sea.");
  await page.keyboard.press("Control+Enter");
  const far = () => page.evaluate(() => document.documentElement.scrollHeight - innerHeight - scrollY);
  await page.waitForFunction(() => document.documentElement.scrollHeight > innerHeight + 200 && document.querySelector(".turn.model[aria-busy=true]"), null, { timeout: 120_000 });
  await page.waitForTimeout(300);
  expect((await far()) <= 60, "the view follows the answer");
  await page.mouse.move(400, 400);
  await page.mouse.wheel(0, -150);
  await page.waitForTimeout(300);
  const top = await page.evaluate(() => scrollY);
  await page.waitForTimeout(700);
  expect((await page.evaluate(() => scrollY)) === top && (await far()) > 60, "until its reader scrolls up");
  await shot("play-scrolled-up");
  await page.getByRole("button", { name: "Jump to end" }).click();
  await page.waitForTimeout(500);
  expect((await far()) <= 60, "and the button leads back to the end");
  expect(await page.getByRole("button", { name: "Jump to end" }).isHidden(), "where it is not needed");
  await page.keyboard.press("Escape");
  await answered();
  await page.waitForTimeout(200);
  const fold = page.locator(".turn.model:last-child .fold > summary");
  const before = (await fold.boundingBox()).y;
  await fold.click();
  await page.waitForTimeout(300);
  expect(Math.abs((await fold.boundingBox()).y - before) < 2, "what is unfolded afterwards does not run away");
  await page.getByRole("button", { name: "New chat" }).click();
  await set("Longest answer", "96");
}

async function race() {
  await open("race");
  await shot("race-empty");
  await page.getByRole("button", { name: "Start" }).click();
  expect(await page.getByText("There is nothing to race with yet").isVisible(), "a race without a prompt says so");
  await set("Longest answer", "64");
  await page.getByLabel("Prompt", { exact: true }).fill("Repeat the alphabet, one letter per line.");
  await page.getByRole("button", { name: "Start" }).click();
  await page.waitForSelector(".verdict:not([hidden])", { timeout: 120_000 });
  const equal = await page.$eval("#equal", (node) => node.textContent);
  expect(/Both texts are equal/.test(equal), `the race says that the texts are equal: ${equal}`);
  await page.getByRole("button", { name: "Again" }).click();
  await page.waitForFunction(() => document.querySelectorAll(".verdict tbody tr").length === 2, null, { timeout: 120_000 });
  expect(await page.getByRole("cell", { name: "draft first" }).isVisible(), "the second run changes the order");
  await shot("race");
  await page.getByLabel("Prompt", { exact: true }).fill("Name three rivers.");
  await page.keyboard.press("Control+Enter");
  expect((await page.$$(".verdict:not([hidden])")).length === 0 && !/alphabet/.test(await page.$eval(".lanes", (node) => node.textContent)), "what came of another prompt goes when a new one starts");
  await page.waitForSelector(".verdict:not([hidden])", { timeout: 120_000 });
  expect((await page.$$(".verdict tbody tr")).length === 1, "and the new race is counted alone");
}

async function generations() {
  await open("generations");
  const count = (await page.$$(".generation")).length;
  expect(count > 3, `what this tab generated is listed: ${count}`);
  await page.waitForTimeout(300);
  await shot("generations");
  await page.locator(".generation").first().click();
  await page.waitForSelector("figure svg");
  const heights = await page.$$eval("figure svg g", (all) => all.map((one) => one.childElementCount));
  const length = Number((await page.$$eval(".tile-value", (all) => all.map((one) => one.textContent)))[1]);
  const mean = heights.reduce((a, b) => a + b, 0) / heights.length;
  expect(Math.abs(mean - length) < 0.01, `the bars of the verify steps have the accept length as their mean: ${mean.toFixed(3)}, ${length}`);
  expect((await page.$$(".answer .tok")).length > 0, "a generation shows its tokens");
  await shot("generation", true);
  await open("generations/tab/999");
  expect(await page.getByText("This generation is gone").isVisible(), "one that is gone is told in words");
}

const fixture = fileURLToPath(new URL("../../fixtures/run-folder-v1", import.meta.url));
const step = (n, total) => `${JSON.stringify({ event: "step", step: n, total_steps: total, epoch: 0, loss: 2 + 20 / n, lr: 0.001, acc: [0.9 - 0.8 / n, 0.6 - 0.5 / n, null], tokens_per_s: 900 })}\n`;
const validation = (n, of) => `${JSON.stringify({ event: "validation", step: n, mean_of: of, accept_len: 1.2 + n / 100, low: 1.1 + n / 100, high: 1.3 + n / 100, verify_steps: 300, committed_tokens: 500, best: true })}\n`;

async function runs() {
  await open("runs");
  if (!options.runs) return;
  const folder = join(options.runs, "page-check");
  const log = join(folder, "train/log.jsonl");
  cpSync(fixture, folder, { recursive: true });
  try {
    writeFileSync(log, Array.from({ length: 40 }, (_, i) => step(i + 1, 60) + ((i + 1) % 10 ? "" : validation(i + 1, []))).join(""));
    await open("runs");
    await page.locator(".record-name", { hasText: "page-check" }).waitFor();
    await shot("runs");
    await page.locator(".record", { hasText: "page-check" }).click();
    await page.waitForSelector(".curve-plot svg");
    expect((await page.$$(".curve-plot svg")).length === 3, "a run has three curves");
    expect((await page.$$(".curve-plot .whisker")).length === 4, "measured accept lengths have their intervals");
    const newest = (nth) => page.locator(".readout").nth(nth).textContent();
    expect((await newest(0)) === "newest: step 40 · 1.60 [1.50, 1.70]", `the newest measurement is read out: ${await newest(0)}`);
    // Broken, unknown and half-written lines, then a step: all but those are drawn, without a reload.
    appendFileSync(log, `{"event":"ste\n[1]\n${step(41, 60)}{"event":"step","step":4`);
    await page.getByText("2 lines of the log could not be read").waitFor({ timeout: 30_000 });
    expect(/step 41/.test(await newest(1)), `the curve grows while the run goes on: ${await newest(1)}`);
    appendFileSync(log, `2,"loss":2.25,"acc":[]}\n${validation(42, [30, 40])}`);
    await page.waitForFunction(() => /step 42/.test(document.querySelectorAll(".readout")[1].textContent), null, { timeout: 30_000 });
    expect(await page.getByText("best mean of several").first().isVisible(), "a mean of several drafts has a mark of its own");
    await page.locator(".curve-plot svg").nth(1).focus();
    for (const key of ["Home", "ArrowRight"]) await page.keyboard.press(key);
    expect(/^step 2 · 12\.000$/.test(await newest(1)), `arrow keys read single values: ${await newest(1)}`);
    await page.getByText("The measurements").click();
    await page.waitForSelector(".fold tbody tr");
    expect((await page.$$(".fold tbody tr")).length === 5, "every measurement stands in a table");
    await shot("run", true);
    await open("runs/no-such-run");
    await page.waitForSelector(".problem");
    expect(await page.getByText("there is no run `no-such-run`").isVisible(), "a run that is not there is told in the server's words");
    await open("runs/page-check");
    for (const width of [1280, 360]) {
      await page.setViewportSize({ width, height: 860 });
      for (const colorScheme of ["light", "dark"]) {
        await page.emulateMedia({ colorScheme });
        await page.waitForTimeout(300);
        if (!(await fits())) throw new Error(`expected: a run fits into ${width} px`);
        await shot(`run-${width}-${colorScheme}`, true);
      }
    }
  } finally {
    rmSync(folder, { recursive: true, force: true });
    await page.setViewportSize({ width: 1280, height: 860 });
    await page.emulateMedia({ colorScheme: "light" });
  }
}

async function measured() {
  await open("bundle");
  await page.waitForSelector("figure svg");
  expect((await page.$$("figure svg[role=img]")).length === 3, "the bundle shows three plots");
  await shot("bundle");
  await shot("bundle-full", true);
  await open("records");
  const names = await page.$$eval(".record-name", (all) => all.map((one) => one.textContent));
  expect(names.length > 0, `records are listed: ${names.length}`);
  await shot("records");
  await page.locator(".record").first().click();
  await page.waitForSelector(".crumbs");
  await page.getByText(/^Raw JSON/).click();
  await page.waitForSelector("pre.raw");
  expect(typeof JSON.parse(await page.$eval("pre.raw", (node) => node.textContent)) === "object", "a record shows its JSON");
  for (const name of names) {
    await open(`records/${encodeURIComponent(name)}`);
    await page.waitForSelector(".crumbs");
    if (await page.$("figure .plot")) await page.waitForSelector("figure svg");
    if (!(await fits())) throw new Error(`record ${name} is wider than the window`);
    await shot(`record-${name}`, true);
  }
  expect(true, "every record opens");
  await open("records/no-such-record");
  await page.waitForSelector(".problem");
  expect(await page.locator(".problem").getByText("Not found").isVisible(), "a record that is not there is told in words");
}

async function live() {
  await open("live");
  await page.waitForTimeout(4000);
  expect((await page.$$(".curve svg path.line")).length === 4, "four curves are drawn");
  await shot("live");
}

async function keyboard() {
  await open("live");
  await page.reload();
  await page.keyboard.press("Tab");
  expect(await page.evaluate(() => document.activeElement.classList.contains("skip")), "the first stop of the keyboard skips to the content");
  await page.keyboard.press("Enter");
  expect(await page.evaluate(() => document.activeElement.id === "main"), "and it does");
}

// Only of a server of several models.
async function models() {
  await open("play");
  const select = page.getByLabel("Model", { exact: true });
  await page.waitForTimeout(500);
  if (!(await select.isVisible())) return;
  const names = await select.locator("option").evaluateAll((all) => all.map((one) => one.value));
  expect(names.length > 1, "the models of the server stand in the header");
  for (const name of names) {
    await select.selectOption(name);
    await page.waitForFunction((name) => document.querySelector(".welcome h2")?.textContent === `Chat with ${name}`, name);
    expect((await page.locator(".turn").count()) === 0, `a conversation with ${name} begins anew`);
    await page.getByLabel("Message", { exact: true }).fill("Why is the sky blue?");
    const sent = page.waitForRequest((request) => request.url().endsWith("/v1/chat/completions"));
    await page.keyboard.press("Enter");
    expect((await sent).postDataJSON().model === name, `${name} is asked`);
    await answered();
    await page.waitForFunction(() => document.getElementById("pill-text").textContent === "with a draft");
    await shot(`models-${names.indexOf(name)}`);
    await open("bundle");
    const own = await page.evaluate((name) => fetch(`/api/bundle?model=${encodeURIComponent(name)}`).then((answer) => answer.json()), name);
    expect((await page.getByRole("heading", { level: 1 }).textContent()).includes(own.bundle.name), `the bundle of ${name} is shown`);
    await open("play");
  }
  await page.reload();
}

async function looks() {
  for (const width of [1280, 360]) {
    await page.setViewportSize({ width, height: width === 360 ? 740 : 860 });
    for (const colorScheme of ["light", "dark"]) {
      await page.emulateMedia({ colorScheme });
      for (const name of ["play", "race", "generations", "runs", "bundle", "records", "live"]) {
        await open(name);
        await page.waitForTimeout(name === "live" ? 2500 : 150);
        if (!(await fits())) throw new Error(`expected: ${name} fits into ${width} px`);
        await shot(`${name}-${width}-${colorScheme}`, name === "bundle");
      }
      await open("play");
      await page.evaluate(() => document.querySelector("details.options").removeAttribute("open"));
      await page.getByLabel("Message", { exact: true }).fill("Why is the sky blue?");
      await page.keyboard.press("Enter");
      await answered();
      await shot(`play-answer-${width}-${colorScheme}`);
      await page.getByRole("button", { name: "New chat" }).click();
    }
  }
  expect(true, "every page fits at 1280 and at 360 px, light and dark");
  await page.getByRole("button", { name: /^Theme/ }).click();
  await page.emulateMedia({ colorScheme: "dark" });
  const paper = await page.evaluate(() => getComputedStyle(document.documentElement).backgroundColor);
  expect(paper === "rgb(251, 251, 249)", "the switch holds against the system's choice");
}

let failed = null;
try {
  for (const part of [models, playground, errors, code, view, race, generations, runs, measured, live, keyboard, looks]) await part();
  expect(complaints.length === 0, `nothing complained in the console ${complaints.join("; ")}`);
  const strangers = asked.filter((url) => !url.startsWith(base) && !url.startsWith("blob:") && !url.startsWith("data:"));
  expect(strangers.length === 0, `nothing was fetched from elsewhere ${strangers.join(" ")}`);
} catch (error) {
  failed = error;
  await shot("failed").catch(() => {});
}
await context.close();
rmSync(profile, { recursive: true, force: true });
if (failed) {
  console.error(`FAILED  ${failed.message}\n${complaints.join("\n")}`);
  process.exit(1);
}
console.log(`${checks} expectations hold`);
