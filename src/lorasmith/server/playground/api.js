// Talking to the server: JSON, and answers as they are written. The key lives here and nowhere else.

const STORED = "lorasmith-key";
let key = sessionStorage.getItem(STORED) ?? "";

export const hasKey = () => key !== "";

/** Use a key from now on; kept over a reload only where asked, and never beyond this tab. */
export function setKey(value, { keep }) {
  key = value.trim();
  if (keep && key) sessionStorage.setItem(STORED, key);
  else sessionStorage.removeItem(STORED);
}

export class ApiError extends Error {
  constructor(status, message, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

async function ask(path, options = {}) {
  const headers = { ...options.headers, ...(key ? { authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers, credentials: "omit", cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server cannot be reached.");
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => null);
  const message = said?.error?.message ?? `The server answered ${response.status}.`;
  throw new ApiError(response.status, message, response.headers.get("retry-after"));
}

export const getJSON = async (path) => (await ask(path)).json();

/** Each event of a streamed chat answer, until its end mark. A stream that breaks off is an error. */
export async function* streamChat(body, signal) {
  const response = await ask("/v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  while (true) {
    const { value, done } = await reader.read();
    if (done) break;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const said = JSON.parse(data);
      if (said.error) throw new ApiError(500, said.error.message);
      yield said;
    }
  }
  throw new ApiError(0, "The connection ended before the answer was complete.");
}
