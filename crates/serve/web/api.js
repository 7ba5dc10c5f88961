// Requests to the server that sent this page, and what can go wrong with them, in words.

const KEY = "draftsmith.key";

export const key = () => sessionStorage.getItem(KEY) ?? "";

export function setKey(value) {
  if (value) sessionStorage.setItem(KEY, value);
  else sessionStorage.removeItem(KEY);
  document.dispatchEvent(new CustomEvent("key-changed"));
}

/** A failed request: `title`, `message` and `hint` for people, `status` (0: no answer) and the server's `code`. */
export class ApiError extends Error {
  constructor(status, title, message, { hint = null, code = null } = {}) {
    super(message);
    this.status = status;
    this.code = code;
    this.title = title;
    this.hint = hint;
  }
}

const TITLES = {
  0: "No answer from the server",
  400: "The server did not accept the request",
  401: "An API key is needed",
  403: "This key may not do that",
  404: "Not found",
  408: "The request took too long",
  413: "The request is too long",
  422: "The server did not accept the request",
  429: "The server is busy",
  503: "The server is not taking requests",
};

const CODES = {
  loading: "The model is being loaded",
  model_not_loaded: "The model is not loaded",
  draining: "The server is going down",
  timeout: "The answer took too long",
};

function failure(status, body) {
  const error = body?.error ?? {};
  const fallback = status >= 500 ? "The server failed" : "The request failed";
  return new ApiError(status, CODES[error.code] ?? TITLES[status] ?? fallback, error.message ?? `status ${status}`, error);
}

async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (key()) headers.authorization = `Bearer ${key()}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, TITLES[0], "It may have stopped, or the network is down.", { hint: "See whether draftsmith serve is still running, then try again." });
  }
  if (!response.ok) {
    // A proxy in between may answer with something else than JSON.
    throw failure(response.status, await response.json().catch(() => null));
  }
  return response;
}

/** JSON of a path. */
export async function get(path, signal) {
  const response = await request(path, { signal });
  return response.json();
}

/**
 * A streamed chat completion.
 *
 * `onChunk({ text, tokens, finish })` is called for every event; tokens are `{ id, text, origin }`. Resolves to what the
 * last events said: `{ id, usage, metrics, timing }`.
 */
export async function chat(body, onChunk, signal) {
  const response = await request("/v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  const end = { id: null, usage: null, metrics: null, timing: null };
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return end;
    const chunk = JSON.parse(data);
    if (chunk.error) throw failure(500, chunk);
    end.id ??= chunk.id ?? null;
    if (chunk.usage) end.usage = chunk.usage;
    if (chunk.metrics?.speculative_decoding) end.metrics = chunk.metrics.speculative_decoding;
    if (chunk.draftsmith?.decode_ms !== undefined) end.timing = chunk.draftsmith;
    const choice = chunk.choices?.[0];
    const tokens = chunk.draftsmith?.tokens ?? [];
    if (choice || tokens.length) {
      onChunk({ text: choice?.delta?.content ?? "", tokens, finish: choice?.finish_reason ?? null });
    }
  }
  throw new ApiError(0, "The answer broke off", "The connection ended before the answer did.", { hint: "Send it again." });
}

/** The `data` of each server-sent event. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    buffer += value.replaceAll("\r", "");
    for (let end; (end = buffer.indexOf("\n\n")) >= 0; buffer = buffer.slice(end + 2)) {
      const lines = buffer.slice(0, end).split("\n").filter((line) => line.startsWith("data:"));
      if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
    }
  }
}
