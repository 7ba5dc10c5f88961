// Drives the page of `draftsmith serve` in a headless Chromium: types, sends, watches the tokens get their colours, stops,
// switches the draft off, races, opens the bundle and a record; wide and narrow, light and dark.
//
//   npm install && node drive.mjs http://127.0.0.1:8080 [--shots DIR] [--key KEY] [--chromium PATH]
//
// The server needs a bundle. Ends with 1 at the first expectation that does not hold.

import { mkdirSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { chromium } from "playwright-core";

const { values: options, positionals } = parseArgs({
  allowPositionals: true,
  options: { shots: { type: "string" }, key: { type: "string" }, chromium: { type: "string", default: "/usr/bin/chromium" } },
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
  expect((await page.$$(".turn.model:last-child tbody tr")).length >= made.length, "every token stands in the list for screen readers");
  await page.getByText("Tokens one by one").click();

  await set("Drafting", "none");
  await page.getByLabel("Message", { exact: true }).fill("Name three colours.");
  await page.keyboard.press("Enter");
  await answered();
  expect((await origins()).every((origin) => origin === "plain"), "without the draft every token is plain");
  await shot("play-no-draft");

  await set("Longest answer", "1000");
  await page.getByLabel("Message", { exact: true }).fill("Write a long story about a lighthouse.");
  await page.keyboard.press("Enter");
  await page.waitForFunction(() => document.querySelectorAll(".turn.model:last-child .tok").length > 3);
  await page.keyboard.press("Escape");
  await answered();
  expect(await page.locator(".turn.model").last().getByText("stopped by you").isVisible(), "Esc stops an answer");
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

async function race() {
  await open("race");
  await shot("race-empty");
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

async function looks() {
  for (const width of [1280, 360]) {
    await page.setViewportSize({ width, height: width === 360 ? 740 : 860 });
    for (const colorScheme of ["light", "dark"]) {
      await page.emulateMedia({ colorScheme });
      for (const name of ["play", "race", "bundle", "records", "live"]) {
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
  for (const part of [playground, errors, race, measured, live, keyboard, looks]) await part();
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
