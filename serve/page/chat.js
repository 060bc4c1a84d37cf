// The chat page: talks to /v1/chat/completions of the server it came from.
// Model text only ever becomes text nodes, so it can never become script or markup.

const SUGGESTIONS = ["Who are you?", "Who made you?", "What is the capital of France?", "你是谁？"];

const element = (id) => document.getElementById(id);
const [log, input, send, stop] = ["log", "input", "send", "stop"].map(element);

const state = { model: null, messages: [], running: null, key: "" };

// ---------------------------------------------------------------- talking to the server

class Refused extends Error {
  constructor(status, body, retryAfter) {
    super(body?.error?.message ?? `the server answered ${status}`);
    this.status = status;
    this.code = body?.error?.code ?? null;
    this.retryAfter = retryAfter;
  }
}

async function request(path, options = {}) {
  const headers = { "Content-Type": "application/json" };
  if (state.key) headers.Authorization = `Bearer ${state.key}`;
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new Refused(response.status, body, response.headers.get("Retry-After"));
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function connect() {
  try {
    const list = await (await request("v1/models")).json();
    state.model = list.data[0].id;
    element("model").textContent = state.model;
    document.title = `${state.model} · RayTune chat`;
    showStatus("ready", "ready");
    element("key-form").hidden = true;
    element("composer").hidden = false;
    input.focus();
  } catch (error) {
    showStatus("failed", "not connected");
    element("model").textContent = error.status === 401 ? "locked" : "not connected";
    if (error.status === 401) askForKey();
    else showProblem(`${error.message}; reload the page to try again`);
  }
  refresh();
}

function askForKey() {
  element("key-form").hidden = false;
  element("composer").hidden = true;
  element("key").focus();
}

// ---------------------------------------------------------------- one answer

async function ask(text) {
  element("welcome").hidden = true;
  state.messages.push({ role: "user", content: text });
  addMessage("user").textContent = text;
  const running = new AbortController();
  state.running = running;
  refresh();
  const answer = new AnswerView();
  try {
    await readAnswer(answer, running.signal);
  } catch (error) {
    if (error.name !== "AbortError") showProblem(explain(error));
  }
  if (state.running !== running) return; // a new chat was started meanwhile
  answer.finish(running.signal.aborted);
  if (answer.text) state.messages.push({ role: "assistant", content: answer.text });
  else if (state.messages.at(-1)?.role === "user") state.messages.pop();
  state.running = null;
  refresh();
  input.focus();
}

async function readAnswer(answer, signal) {
  const response = await startAnswer(signal);
  for await (const event of events(response)) {
    if (event.error) throw new Refused(500, event);
    answer.add(event.choices[0]?.delta?.content ?? "");
    if (event.usage) answer.tokens = event.usage.completion_tokens;
    if (event.choices[0]?.finish_reason === "length") answer.cut = true;
  }
}

// The oldest turns are left out, one by one, when the conversation outgrows the model's context.
async function startAnswer(signal) {
  for (;;) {
    const body = JSON.stringify({
      model: state.model,
      messages: state.messages,
      stream: true,
      stream_options: { include_usage: true },
    });
    try {
      return await request("v1/chat/completions", { method: "POST", body, signal });
    } catch (error) {
      if (error.code !== "context_length_exceeded" || state.messages.length < 3) throw error;
      state.messages.splice(0, 2);
    }
  }
}

function explain(error) {
  if (error.status === 429) {
    return `The server is busy. Try again in ${error.retryAfter ?? "a few"} seconds.`;
  }
  if (error.status === 401) askForKey();
  return error instanceof TypeError ? "The server cannot be reached." : error.message;
}

class AnswerView {
  constructor() {
    this.text = "";
    this.tokens = 0;
    this.cut = false;
    this.began = performance.now();
    this.box = addMessage("assistant");
    this.box.classList.add("writing");
    this.box.setAttribute("aria-busy", "true");
    this.body = child(this.box, "div", "text");
    this.pending = false;
  }

  add(text) {
    this.text += text;
    if (!text || this.pending) return;
    this.pending = true;
    requestAnimationFrame(() => this.draw());
  }

  draw() {
    this.pending = false;
    const following = atBottom();
    this.body.replaceChildren(...renderMarkdown(this.text));
    if (following) toBottom();
  }

  finish(stopped) {
    this.draw();
    this.box.classList.remove("writing");
    this.box.removeAttribute("aria-busy");
    if (!this.text && !stopped) this.box.remove();
    const seconds = (performance.now() - this.began) / 1000;
    const notes = [];
    if (this.tokens) notes.push(`${this.tokens} tokens in ${seconds.toFixed(1)} s`);
    if (stopped) notes.push("stopped");
    else if (this.cut) notes.push("cut at the length limit");
    const following = atBottom();
    if (notes.length) child(this.box, "div", "meta").textContent = notes.join(" · ");
    if (following) toBottom();
  }
}

// ---------------------------------------------------------------- markdown, as DOM nodes

function renderMarkdown(source) {
  const blocks = [];
  const lines = source.split("\n");
  for (let at = 0; at < lines.length; ) {
    const [node, next] = codeBlock(lines, at) ?? list(lines, at) ?? heading(lines, at) ?? paragraph(lines, at);
    if (node) blocks.push(node);
    at = next;
  }
  return blocks;
}

function codeBlock(lines, at) {
  if (!/^\s*```/.test(lines[at])) return null;
  let end = at + 1;
  while (end < lines.length && !/^\s*```\s*$/.test(lines[end])) end += 1;
  const block = document.createElement("pre");
  block.tabIndex = 0; // so that a long line can be scrolled by keyboard
  child(block, "code").textContent = lines.slice(at + 1, end).join("\n");
  return [block, end + 1];
}

const BULLET = /^\s*[-*+]\s+(?=\S)/;
const NUMBER = /^\s*(\d{1,9})[.)]\s+(?=\S)/;

function list(lines, at) {
  const mark = [BULLET, NUMBER].find((pattern) => pattern.test(lines[at]));
  if (!mark) return null;
  const block = document.createElement(mark === BULLET ? "ul" : "ol");
  if (mark === NUMBER) block.start = Number(lines[at].match(NUMBER)[1]);
  let end = at;
  for (; end < lines.length && mark.test(lines[end]); end += 1) {
    child(block, "li").append(...inline(lines[end].replace(mark, "")));
  }
  return [block, end];
}

function heading(lines, at) {
  const match = lines[at].match(/^#{1,6}\s+(.+)$/);
  if (!match) return null;
  const block = document.createElement("h3");
  block.append(...inline(match[1]));
  return [block, at + 1];
}

function paragraph(lines, at) {
  let end = at;
  const starts = (line) => /^\s*```|^#{1,6}\s+\S/.test(line) || BULLET.test(line) || NUMBER.test(line);
  while (end < lines.length && lines[end].trim() && (end === at || !starts(lines[end]))) end += 1;
  if (end === at) return [null, at + 1];
  const block = document.createElement("p");
  block.append(...inline(lines.slice(at, end).join("\n")));
  return [block, end];
}

function inline(text) {
  return text.split(/(`[^`\n]+`|\*\*[^*\n]+\*\*)/).filter(Boolean).map((part) => {
    const bold = /^\*\*[^*\n]+\*\*$/.test(part);
    if (!bold && !/^`[^`\n]+`$/.test(part)) return document.createTextNode(part);
    const node = document.createElement(bold ? "strong" : "code");
    node.textContent = bold ? part.slice(2, -2) : part.slice(1, -1);
    return node;
  });
}

// ---------------------------------------------------------------- the page

function child(parent, tag, className = "") {
  const node = document.createElement(tag);
  if (className) node.className = className;
  parent.append(node);
  return node;
}

function addMessage(role) {
  const box = child(log, "article", `message ${role}`);
  box.setAttribute("aria-label", role === "user" ? "You" : "Answer");
  toBottom();
  return box;
}

function showProblem(text) {
  const box = child(log, "div", "problem");
  box.setAttribute("role", "alert");
  box.textContent = text;
  toBottom();
}

function showStatus(className, label) {
  element("status").className = `status ${className}`;
  element("status").setAttribute("aria-label", label);
}

const scroller = element("scroller");
const atBottom = () => scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 80;
const toBottom = () => { scroller.scrollTop = scroller.scrollHeight; };

function refresh() {
  const running = state.running !== null;
  send.hidden = running;
  stop.hidden = !running;
  send.disabled = !state.model || !input.value.trim();
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight + 2}px`;
}

function submit() {
  const text = input.value.trim();
  if (!text || !state.model || state.running) return;
  input.value = "";
  ask(text);
}

function newChat() {
  state.running?.abort();
  state.running = null;
  state.messages = [];
  log.replaceChildren();
  element("welcome").hidden = false;
  refresh();
  input.focus();
}

for (const text of SUGGESTIONS) {
  const button = child(element("suggestions"), "button", "quiet");
  button.type = "button";
  button.textContent = text;
  button.addEventListener("click", () => state.model && !state.running && ask(text));
}
element("new-chat").addEventListener("click", newChat);
element("composer").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
stop.addEventListener("click", () => state.running?.abort());
input.addEventListener("input", refresh);
input.addEventListener("keydown", (event) => {
  // while an input method composes (Chinese, Japanese), Enter belongs to it
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});
element("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  state.key = element("key").value.trim();
  connect();
});

connect();
