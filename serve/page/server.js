// What the page asks of the server it came from: models, and answers as they are written.

let key = "";
export const useKey = (text) => { key = text; };

export class Refused extends Error {
  constructor(status, body, retryAfter) {
    super(body?.error?.message ?? `the server answered ${status}`);
    this.status = status;
    this.code = body?.error?.code ?? null;
    this.retryAfter = retryAfter;
  }
}

async function request(path, options = {}) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new Refused(response.status, body, response.headers.get("Retry-After"));
}

export async function models() {
  const list = await (await request("v1/models")).json();
  return list.data.map((one) => one.id);
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Refused(500, { error: { message: "the answer broke off" } });
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}

// Yields {text, thought, finish, usage} as they come; whatever is missing was not said.
export async function* answer(body, signal) {
  const whole = JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } });
  const response = await request("v1/chat/completions", { method: "POST", body: whole, signal });
  for await (const event of events(response)) {
    if (event.error) throw new Refused(500, event);
    const choice = event.choices?.[0];
    yield {
      text: choice?.delta?.content ?? "",
      thought: choice?.delta?.reasoning_content ?? "",
      finish: choice?.finish_reason ?? null,
      usage: event.usage ?? null,
    };
  }
}

export function explain(error) {
  if (error.status === 429) {
    return `The server is busy. Try again in ${error.retryAfter ?? "a few"} seconds.`;
  }
  return error instanceof TypeError ? "The server cannot be reached." : error.message;
}
