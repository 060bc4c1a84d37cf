// Markdown as DOM nodes. Text only ever becomes text nodes, so a model's words can never become
// script, markup or a link.

export function renderMarkdown(source) {
  const blocks = [];
  const lines = source.split("\n");
  for (let at = 0; at < lines.length; ) {
    for (const block of BLOCKS) {
      const found = block(lines, at);
      if (!found) continue;
      if (found[0]) blocks.push(found[0]);
      at = found[1];
      break;
    }
  }
  return blocks;
}

const FENCE = /^\s*```/;
const HEADING = /^#{1,6}\s+(.+)$/;
const QUOTE = /^\s*>\s?/;
const BULLET = /^\s*[-*+]\s+(?=\S)/;
const NUMBER = /^\s*(\d{1,9})[.)]\s+(?=\S)/;
const RULE = /^\s*\|?\s*:?-{2,}:?\s*(\|\s*:?-{2,}:?\s*)+\|?\s*$/;

// in the order in which they are tried; a paragraph is what nothing else is
const BLOCKS = [codeBlock, table, list, heading, quote, paragraph];

function codeBlock(lines, at) {
  if (!FENCE.test(lines[at])) return null;
  let end = at + 1;
  while (end < lines.length && !/^\s*```\s*$/.test(lines[end])) end += 1;
  const block = document.createElement("pre");
  block.tabIndex = 0; // so that a long line can be scrolled by keyboard
  make(block, "code").textContent = lines.slice(at + 1, end).join("\n");
  return [block, end + 1];
}

function table(lines, at) {
  if (!lines[at].includes("|") || !RULE.test(lines[at + 1] ?? "")) return null;
  const frame = document.createElement("div");
  frame.className = "table";
  frame.tabIndex = 0;
  const block = make(frame, "table");
  row(make(block, "thead"), "th", lines[at]);
  const body = make(block, "tbody");
  let end = at + 2;
  for (; end < lines.length && lines[end].includes("|"); end += 1) row(body, "td", lines[end]);
  return [frame, end];
}

function row(parent, tag, line) {
  const cells = line.trim().replace(/^\||\|$/g, "").split("|");
  const made = make(parent, "tr");
  for (const cell of cells) make(made, tag).append(...inline(cell.trim()));
}

function list(lines, at) {
  const mark = [BULLET, NUMBER].find((pattern) => pattern.test(lines[at]));
  if (!mark) return null;
  const block = document.createElement(mark === BULLET ? "ul" : "ol");
  if (mark === NUMBER) block.start = Number(lines[at].match(NUMBER)[1]);
  let end = at;
  for (; end < lines.length && mark.test(lines[end]); end += 1) {
    make(block, "li").append(...inline(lines[end].replace(mark, "")));
  }
  return [block, end];
}

function heading(lines, at) {
  const match = lines[at].match(HEADING);
  if (!match) return null;
  const block = document.createElement("h3");
  block.append(...inline(match[1]));
  return [block, at + 1];
}

function quote(lines, at) {
  if (!QUOTE.test(lines[at])) return null;
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) end += 1;
  const block = document.createElement("blockquote");
  block.append(...inline(lines.slice(at, end).map((line) => line.replace(QUOTE, "")).join("\n")));
  return [block, end];
}

function paragraph(lines, at) {
  let end = at;
  const starts = (line) => [FENCE, HEADING, QUOTE, BULLET, NUMBER].some((one) => one.test(line));
  while (end < lines.length && lines[end].trim() && (end === at || !starts(lines[end]))) end += 1;
  if (end === at) return [null, at + 1];
  const block = document.createElement("p");
  block.append(...inline(lines.slice(at, end).join("\n")));
  return [block, end];
}

const SPANS = { "**": "strong", "`": "code", "*": "em" };

function inline(text) {
  const pattern = /(`[^`\n]+`|\*\*[^*\n]+\*\*|(?<![*\w])\*[^*\s](?:[^*\n]*[^*\s])?\*(?![*\w]))/;
  return text.split(pattern).filter(Boolean).map((part) => {
    const mark = Object.keys(SPANS).find((one) => (
      part.length > 2 * one.length && part.startsWith(one) && part.endsWith(one) && pattern.test(part)
    ));
    if (!mark) return document.createTextNode(part);
    const node = document.createElement(SPANS[mark]);
    node.textContent = part.slice(mark.length, -mark.length);
    return node;
  });
}

function make(parent, tag) {
  const node = document.createElement(tag);
  parent.append(node);
  return node;
}
