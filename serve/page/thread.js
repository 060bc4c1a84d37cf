// A conversation as data: turns of one question, and for each pane the tries to answer it.

export class Thread {
  constructor() {
    this.turns = [];
    this.forgotten = [0, 0]; // turns that no longer fit into a pane's context
  }

  get last() {
    return this.turns.length - 1;
  }

  add(question) {
    this.turns.push({ question, tries: [[], []], shown: [0, 0] });
    return this.last;
  }

  // Forget turn `at` and all behind it.
  cut(at) {
    this.turns.length = at;
    this.forgotten = this.forgotten.map((count) => Math.min(count, at));
  }

  begin(at, pane, model) {
    const attempt = { model, text: "", thought: "", finish: null, usage: null, problem: "" };
    const turn = this.turns[at];
    turn.shown[pane] = turn.tries[pane].push(attempt) - 1;
    return attempt;
  }

  shown(at, pane) {
    const turn = this.turns[at];
    return turn.tries[pane][turn.shown[pane]];
  }

  // Messages that ask turn `at` in a pane; what was never answered there is left out.
  messages(at, pane, system) {
    const found = system ? [{ role: "system", content: system }] : [];
    for (let before = this.forgotten[pane]; before < at; before += 1) {
      const given = this.shown(before, pane);
      if (!given?.text) continue;
      found.push({ role: "user", content: this.turns[before].question });
      found.push({ role: "assistant", content: given.text });
    }
    return [...found, { role: "user", content: this.turns[at].question }];
  }

  // Forget one more of the oldest turns in a pane; false when only turn `at` is left.
  forget(at, pane) {
    if (this.forgotten[pane] >= at) return false;
    this.forgotten[pane] += 1;
    return true;
  }
}
