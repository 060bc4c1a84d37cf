// Turns as elements. A model's text reaches the page through renderMarkdown and textContent only.

import { renderMarkdown } from "./markdown.js";

const log = document.getElementById("log");
const scroller = document.getElementById("scroller");
const atBottom = () => scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 80;
export const toBottom = () => { scroller.scrollTop = scroller.scrollHeight; };

export function child(parent, tag, className = "") {
  const node = document.createElement(tag);
  if (className) node.className = className;
  parent.append(node);
  return node;
}

function button(parent, label, act, name = label) {
  const made = child(parent, "button", "small");
  made.type = "button";
  made.textContent = label;
  made.setAttribute("aria-label", name);
  made.addEventListener("click", act);
  return made;
}

function following(change) {
  const follow = atBottom();
  change();
  if (follow) toBottom();
}

// One question with its answers beside each other. `acts` has edit(at, text), retry(at) and
// turnTo(at, pane, index).
export class TurnView {
  constructor(thread, at, panes, acts) {
    [this.thread, this.at, this.acts] = [thread, at, acts];
    this.box = child(log, "section", "turn");
    this.drawQuestion();
    const answers = child(this.box, "div", panes > 1 ? "answers two" : "answers");
    this.panes = Array.from({ length: panes }, (_, pane) => new AnswerView(answers, this, pane));
    toBottom();
  }

  drawQuestion() {
    this.question ??= child(this.box, "article", "message user");
    this.question.className = "message user";
    this.question.setAttribute("aria-label", "You");
    this.question.textContent = this.thread.turns[this.at].question;
    this.tools ??= child(this.box, "div", "tools asked");
    this.tools.replaceChildren();
    button(this.tools, "Edit", () => this.edit(), "Edit this question");
  }

  edit() {
    if (this.question.querySelector("textarea")) return;
    this.question.className = "message user editing";
    this.question.replaceChildren();
    const area = child(this.question, "textarea");
    area.value = this.thread.turns[this.at].question;
    area.rows = Math.min(8, area.value.split("\n").length + 1);
    area.setAttribute("aria-label", "Question");
    this.tools.replaceChildren();
    const ask = () => { if (area.value.trim()) this.acts.edit(this.at, area.value.trim()); };
    button(this.tools, "Ask again", ask);
    button(this.tools, "Cancel", () => this.drawQuestion());
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        this.drawQuestion();
      }
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      ask();
    });
    area.focus();
  }

  draw() {
    for (const pane of this.panes) pane.draw();
  }

  remove() {
    this.box.remove();
  }
}

class AnswerView {
  constructor(parent, turn, pane) {
    [this.turn, this.pane] = [turn, pane];
    this.box = child(parent, "article", "message assistant");
    this.box.setAttribute("aria-label", "Answer");
    this.head = child(this.box, "div", "head");
    this.thought = child(this.box, "details", "thought");
    child(this.thought, "summary").textContent = "Thoughts";
    this.thoughtText = child(this.thought, "div");
    this.text = child(this.box, "div", "text");
    this.foot = child(this.box, "div", "foot");
    this.waiting = false;
  }

  // Draw once a frame however many pieces come.
  drawSoon() {
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => {
      this.waiting = false;
      this.draw();
    });
  }

  draw() {
    const attempt = this.turn.thread.shown(this.turn.at, this.pane);
    this.box.hidden = !attempt;
    if (!attempt) return;
    const writing = attempt.finish === null;
    following(() => {
      this.box.classList.toggle("writing", writing);
      this.box.classList.toggle("failed", attempt.finish === "failed" && !attempt.text);
      if (writing) this.box.setAttribute("aria-busy", "true");
      else this.box.removeAttribute("aria-busy");
      this.head.hidden = this.turn.panes.length < 2;
      this.head.textContent = attempt.model;
      this.thought.hidden = !attempt.thought;
      this.thoughtText.textContent = attempt.thought;
      this.text.replaceChildren(...renderMarkdown(attempt.text));
      this.foot.replaceChildren();
      if (!writing) this.drawFoot(attempt);
    });
  }

  drawFoot(attempt) {
    if (attempt.problem) {
      const problem = child(this.foot, "div", "problem");
      problem.setAttribute("role", "alert");
      problem.textContent = attempt.problem;
    }
    const notes = notesOf(attempt);
    if (notes) child(this.foot, "div", "meta").textContent = notes;
    this.drawTools(child(this.foot, "div", "tools"), attempt);
  }

  drawTools(tools, attempt) {
    const { thread, at, acts } = this.turn;
    const { tries, shown } = thread.turns[at];
    const [count, place] = [tries[this.pane].length, shown[this.pane]];
    if (count > 1) {
      const turnTo = (index) => acts.turnTo(at, this.pane, (index + count) % count);
      button(tools, "‹", () => turnTo(place - 1), "Earlier answer");
      child(tools, "span", "count").textContent = `${place + 1} / ${count}`;
      button(tools, "›", () => turnTo(place + 1), "Later answer");
    }
    if (at === thread.last) button(tools, "Retry", () => acts.retry(at), "Answer again");
    if (attempt.text && navigator.clipboard) {
      const copy = button(tools, "Copy", async () => {
        await navigator.clipboard.writeText(attempt.text);
        copy.textContent = "Copied";
      }, "Copy this answer");
    }
  }
}

function notesOf(attempt) {
  const notes = [];
  const { usage } = attempt;
  if (usage) {
    notes.push(`${usage.completion_tokens} tokens`);
    const writing = (attempt.ended - attempt.first) / 1000;
    if (usage.completion_tokens > 1 && writing > 0) {
      const speed = (usage.completion_tokens - 1) / writing;
      notes.push(`${speed.toFixed(speed < 100 ? 1 : 0)} tokens/s`);
    }
    if (attempt.first) notes.push(`first after ${((attempt.first - attempt.began) / 1000).toFixed(2)} s`);
    const kept = usage.prompt_tokens_details?.cached_tokens;
    notes.push(`${usage.prompt_tokens} read${kept ? `, ${kept} of them kept` : ""}`);
  }
  if (attempt.finish === "stopped") notes.push("stopped");
  if (attempt.finish === "length") notes.push("cut at the length limit");
  return notes.join(" · ");
}
