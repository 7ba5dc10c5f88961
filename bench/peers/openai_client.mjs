// Asks a running `draftsmith serve` through the official JavaScript client, the way users do.
//
// Usage: node openai_client.mjs URL [KEY]
//
// URL is the server's (`http://127.0.0.1:8080`), KEY one of its API keys if it has any. Needs the package `openai` where
// node finds it from the working folder. Prints a line for each check and ends with 1 at the first that fails. Answers are
// not judged, only their form and what must be equal.

import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [url, key] = process.argv.slice(2);
if (!url) {
  console.error("usage: node openai_client.mjs URL [KEY]");
  process.exit(2);
}
const found = createRequire(`${process.cwd()}/`).resolve("openai");
const { default: OpenAI } = await import(pathToFileURL(found));
const options = { baseURL: `${url.replace(/\/$/, "")}/v1`, maxRetries: 0, timeout: 120_000 };
const client = new OpenAI({ ...options, apiKey: key ?? "none" });
const messages = [{ role: "user", content: "Calculate 22 + 20." }];

function check(name, holds, found) {
  if (!holds) {
    console.log(`FAILED ${name}: ${JSON.stringify(found)}`);
    process.exit(1);
  }
  console.log(`ok ${name}`);
}

async function refused(name, status, ask, param) {
  let found;
  try {
    found = await ask();
  } catch (error) {
    const told = error instanceof OpenAI.APIError && error.status === status && error.message.length > 0;
    return check(name, told && (param === undefined || error.param === param), `${error}`);
  }
  check(name, false, found);
}

const model = (await client.models.list()).data[0].id;
check("a model is found by its name", (await client.models.retrieve(model)).id === model);
const chat = (more = {}) => client.chat.completions.create({ model, messages, max_tokens: 24, ...more });
const text = async (more) => (await chat(more)).choices[0].message.content;

const answer = await chat({ temperature: 0 });
const full = answer.choices[0].message.content;
check("an answer has text", full.length > 0 && answer.choices[0].message.role === "assistant", answer);
const used = answer.usage;
check("usage adds up", used.total_tokens === used.prompt_tokens + used.completion_tokens, used);

let streamed = "";
let last;
for await (const part of await chat({ temperature: 0, stream: true, stream_options: { include_usage: true } })) {
  streamed += part.choices[0]?.delta?.content ?? "";
  last = part;
}
check("a streamed answer has the same text", streamed === full, streamed);
check("a stream ends with its usage", last.usage.total_tokens === used.total_tokens, last);

const left = await chat({ temperature: 0, stream: true, max_tokens: 200 });
for await (const _ of left) break;
check("a reader may leave a stream", left.controller.signal.aborted);

const seeded = await text({ temperature: 1, seed: 7 });
check("one seed gives one text", (await text({ temperature: 1, seed: 7 })) === seeded);
const plain = await text({ temperature: 1, seed: 7, draftsmith: { draft: "none" } });
check("a seed gives the same text without a draft", plain === seeded, plain);

const stop = full.slice(2, 4);
const stopped = (await chat({ temperature: 0, stop })).choices[0];
check("a stop text ends the answer before it", stopped.message.content === full.slice(0, full.indexOf(stop)), stopped);

const several = (await chat({ temperature: 1, seed: 7, n: 3 })).choices;
check("n answers come in order", several.map((choice) => choice.index).join() === "0,1,2", several);

const tokens = await chat({ temperature: 0, logprobs: true, top_logprobs: 2 });
const content = tokens.choices[0].logprobs.content;
check("each token has a log-probability", content.length === tokens.usage.completion_tokens, content);
check("and the most probable ones beside it", content.every((token) => token.top_logprobs.length === 2));

const schema = {
  type: "object",
  properties: { colour: { enum: ["red", "green"] }, size: { type: "integer", minimum: 1, maximum: 99 } },
  required: ["colour", "size"],
  additionalProperties: false,
};
const response_format = { type: "json_schema", json_schema: { name: "thing", schema, strict: true } };
const value = JSON.parse(await text({ temperature: 1, seed: 1, max_tokens: 200, response_format }));
check("an answer follows its schema", ["red", "green"].includes(value.colour) && value.size >= 1 && value.size <= 99, value);

const completion = await client.completions.create({ model, prompt: "Once", max_tokens: 8, temperature: 0 });
check("a text is continued", completion.choices[0].text.length > 0, completion);

if (key) {
  const stranger = new OpenAI({ ...options, apiKey: "wrong" });
  await refused("a wrong key is refused", 401, () => stranger.models.list());
}
await refused("an unknown model is refused", 404, () => chat({ model: "none-such" }), "model");
await refused("an empty conversation is refused", 400, () => chat({ messages: [] }), "messages");
await refused("a temperature out of range is refused", 400, () => chat({ temperature: 9 }), "temperature");
check("the server still answers", (await text({ temperature: 0 })) === full);
