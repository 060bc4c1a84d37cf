// The chat page: one conversation with one model, or with two beside each other.

import * as server from "./server.js";
import * as settings from "./settings.js";
import { Thread } from "./thread.js";
import { TurnView, child, toBottom } from "./view.js";

const SUGGESTIONS = ["Who are you?", "Who made you?", "What is the capital of France?", "你是谁？"];

const element = (id) => document.getElementById(id);
const [log, input, send, stop] = ["log", "input", "send", "stop"].map(element);
const pickers = [element("model-0"), element("model-1")];

const state = { models: [], comparing: false, running: null, thread: new Thread(), views: [] };
const chosen = (pane) => pickers[pane].value;

// ---------------------------------------------------------------- models

async function connect() {
  try {
    state.models = await server.models();
    fillPickers();
    showStatus("ready", "ready");
    element("key-form").hidden = true;
    element("composer").hidden = false;
    input.focus();
  } catch (error) {
    showStatus("failed", "not connected");
    element("title").textContent = error.status === 401 ? "locked" : "not connected";
    if (error.status === 401) askForKey();
    else showProblem(`${server.explain(error)} Reload the page to try again.`);
  }
  refresh();
}

function fillPickers() {
  for (const [pane, picker] of pickers.entries()) {
    picker.replaceChildren();
    for (const name of state.models) child(picker, "option").textContent = name;
    picker.selectedIndex = Math.min(pane, state.models.length - 1);
  }
  showModels();
}

function showModels() {
  const several = state.models.length > 1;
  element("title").textContent = several ? "RayTune chat" : state.models[0];
  element("title").classList.toggle("hidden", several);
  pickers[0].hidden = !several;
  pickers[1].hidden = !state.comparing;
  element("compare").hidden = !several;
  element("compare").setAttribute("aria-pressed", String(state.comparing));
  document.body.classList.toggle("comparing", state.comparing);
  document.title = `${chosen(0)}${state.comparing ? ` and ${chosen(1)}` : ""} · RayTune chat`;
}

function compare() {
  state.comparing = !state.comparing;
  showModels();
  newChat();
}

function askForKey() {
  element("key-form").hidden = false;
  element("composer").hidden = true;
  element("key").focus();
}

// ---------------------------------------------------------------- asking

const acts = {
  edit(at, question) {
    if (state.running) return;
    cut(at);
    ask(question);
  },
  retry(at) {
    if (!state.running) answerAll(at);
  },
  turnTo(at, pane, index) {
    state.thread.turns[at].shown[pane] = index;
    state.views[at].draw();
  },
};

function ask(question) {
  element("welcome").hidden = true;
  const at = state.thread.add(question);
  state.views.push(new TurnView(state.thread, at, state.comparing ? 2 : 1, acts));
  if (at > 0) state.views[at - 1].draw(); // only the last turn can be answered again
  return answerAll(at);
}

async function answerAll(at) {
  const running = new AbortController();
  state.running = running;
  refresh();
  const { panes } = state.views[at];
  await Promise.all(panes.map((_, pane) => answer(at, pane, running.signal)));
  if (state.running !== running) return; // a new chat was started meanwhile
  state.running = null;
  refresh();
  input.focus();
}

async function answer(at, pane, signal) {
  const { thread } = state;
  const view = state.views[at].panes[pane];
  const attempt = thread.begin(at, pane, chosen(pane));
  attempt.began = performance.now();
  view.draw();
  try {
    await read(thread, at, pane, attempt, view, signal);
    attempt.finish ??= "stop";
  } catch (error) {
    attempt.finish = signal.aborted ? "stopped" : "failed";
    if (!signal.aborted) attempt.problem = server.explain(error);
    if (error.status === 401) askForKey();
  }
  attempt.ended = performance.now();
  view.draw();
}

async function read(thread, at, pane, attempt, view, signal) {
  let finish = null;
  for await (const piece of withRoom(thread, at, pane, attempt, signal)) {
    if (piece.text || piece.thought) attempt.first ??= performance.now();
    attempt.text += piece.text;
    attempt.thought += piece.thought;
    attempt.usage = piece.usage ?? attempt.usage;
    finish = piece.finish ?? finish;
    view.drawSoon();
  }
  attempt.finish = finish;
}

// The oldest turns are left out, one by one, when the conversation outgrows the model's context.
async function* withRoom(thread, at, pane, attempt, signal) {
  const place = thread.turns[at].tries[pane].indexOf(attempt);
  for (;;) {
    const messages = thread.messages(at, pane, settings.system());
    const body = { model: attempt.model, messages, ...settings.sampling(place) };
    try {
      yield* server.answer(body, signal);
      return;
    } catch (error) {
      const full = error.code === "context_length_exceeded";
      if (!full || !thread.forget(at, pane)) throw error;
    }
  }
}

// ---------------------------------------------------------------- the page

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

function refresh() {
  const running = state.running !== null;
  send.hidden = running;
  stop.hidden = !running;
  send.disabled = !state.models.length || !input.value.trim();
  for (const picker of pickers) picker.disabled = running;
  log.classList.toggle("busy", running);
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight + 2}px`;
}

function submit() {
  const text = input.value.trim();
  if (!text || !state.models.length || state.running) return;
  input.value = "";
  ask(text);
}

function cut(at) {
  state.thread.cut(at);
  for (const view of state.views.splice(at)) view.remove();
}

function newChat() {
  state.running?.abort();
  state.running = null;
  state.thread = new Thread();
  state.views = [];
  log.replaceChildren();
  element("welcome").hidden = false;
  refresh();
  input.focus();
}

function editLast() {
  if (!state.running && state.views.length) state.views.at(-1).edit();
}

// by the key's place: with Alt a Mac's keys write other letters
const SHORTCUTS = {
  KeyN: newChat,
  KeyS: settings.open,
  KeyR: () => { if (state.views.length) acts.retry(state.thread.last); },
};

for (const text of SUGGESTIONS) {
  const button = child(element("suggestions"), "button", "quiet");
  button.type = "button";
  button.textContent = text;
  button.addEventListener("click", () => state.models.length && !state.running && ask(text));
}
element("new-chat").addEventListener("click", newChat);
element("open-settings").addEventListener("click", settings.open);
element("compare").addEventListener("click", compare);
for (const picker of pickers) picker.addEventListener("change", showModels);
element("composer").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
stop.addEventListener("click", () => state.running?.abort());
input.addEventListener("input", refresh);
input.addEventListener("keydown", (event) => {
  // while an input method composes (Chinese, Japanese), keys belong to it
  if (event.isComposing || event.shiftKey) return;
  if (event.key === "ArrowUp" && !input.value) {
    event.preventDefault();
    editLast();
  }
  if (event.key !== "Enter") return;
  event.preventDefault();
  submit();
});
document.addEventListener("keydown", (event) => {
  if (settings.isOpen()) return;
  if (event.key === "Escape" && !event.isComposing) state.running?.abort();
  const act = event.altKey && !event.ctrlKey && !event.metaKey && SHORTCUTS[event.code];
  if (!act) return;
  event.preventDefault();
  act();
});
element("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  server.useKey(element("key").value.trim());
  connect();
});

connect();
