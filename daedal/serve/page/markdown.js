// A small, safe part of Markdown: headings, lists, tables, code, bold, italics, links to the web. Text only ever becomes
// text nodes, and an address only that of a link, so nothing that a model writes can become markup.

import { iconButton, make } from "./elements.js";

const FENCE = /^\s*(```+|~~~+)\s*(\S*)\s*$/;
const HEADING = /^#{1,6}\s+(.*)$/;
const BULLET = /^\s*[-*+]\s+(.*)$/;
const NUMBER = /^\s*(\d{1,9})[.)]\s+(.*)$/;
const ROW = /^\|.*\|$/;
const RULE = /^\|[\s:|-]+$/;
// Code opens with one to three backticks and no more: a long run of them would take the search cubic time. What a link
// may hold is bounded for the same reason.
const CODE = "(?<!`)(`{1,3})(?!`)(.+?)(?<!`)\\1(?!`)";
const BOLD = "\\*\\*(?=\\S)(.+?)\\*\\*";
const ITALIC = "\\*(?=[^\\s*])([^*\\n]+?)\\*(?!\\w)";
const LINK = "\\[([^\\[\\]\\n]{1,200})\\]\\((https?:/{2}[^\\s()<>]{1,1000})\\)";
const INLINE = new RegExp([CODE, BOLD, ITALIC, LINK].join("|"), "gs");

export function render(text) {
  const blocks = document.createDocumentFragment();
  const lines = text.split("\n");
  for (let at = 0; at < lines.length; ) {
    at = lines[at].trim() ? block(lines, at, blocks) : at + 1;
  }
  return blocks;
}

// Appends the block that begins at line `at`; returns the line after it.
function block(lines, at, into) {
  if (FENCE.test(lines[at])) return code(lines, at, into);
  const heading = HEADING.exec(lines[at]);
  if (heading) {
    into.append(filled("h3", heading[1]));
    return at + 1;
  }
  if (BULLET.test(lines[at])) return list(lines, at, into, "ul", BULLET);
  if (NUMBER.test(lines[at])) return list(lines, at, into, "ol", NUMBER);
  if (startsTable(lines, at)) return table(lines, at, into);
  return paragraph(lines, at, into);
}

function code(lines, at, into) {
  const [, fence, language] = FENCE.exec(lines[at]);
  let end = at + 1;
  while (end < lines.length && !lines[end].trim().startsWith(fence)) end += 1;
  const block = make("div", "code");
  const head = make("div", "code-head", language);
  const pre = make("pre");
  const button = iconButton("copy", "Copy the code");
  button.classList.add("copy");
  pre.tabIndex = 0; // so that the keyboard can scroll it
  pre.append(make("code", "", lines.slice(at + 1, end).join("\n")));
  head.append(button);
  block.append(head, pre);
  into.append(block);
  return end + 1;
}

function startsTable(lines, at) {
  return isRow(lines[at]) && RULE.test(lines[at + 1]?.trim() ?? "") && lines[at + 1].includes("-");
}

function isRow(line) {
  return ROW.test(line.trim());
}

function table(lines, at, into) {
  const element = make("table");
  const frame = make("div", "table");
  frame.tabIndex = 0;
  let end = at;
  for (; end < lines.length && isRow(lines[end]); end += 1) {
    if (end === at + 1) continue;
    const row = element.insertRow();
    const cells = lines[end].trim().slice(1, -1).split("|");
    row.append(...cells.map((cell) => filled(end === at ? "th" : "td", cell.trim())));
  }
  frame.append(element);
  into.append(frame);
  return end;
}

function list(lines, at, into, tag, pattern) {
  const element = make(tag);
  if (tag === "ol") element.start = Number(pattern.exec(lines[at])[1]);
  let end = at;
  while (end < lines.length && pattern.test(lines[end])) {
    element.append(filled("li", pattern.exec(lines[end]).at(-1)));
    end += 1;
    if (end + 1 < lines.length && !lines[end].trim() && pattern.test(lines[end + 1])) end += 1;
  }
  into.append(element);
  return end;
}

function paragraph(lines, at, into) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !startsBlock(lines[end]) && !startsTable(lines, end)) end += 1;
  const element = make("p");
  lines.slice(at, end).forEach((line, index) => {
    if (index) element.append(make("br"));
    inline(line, element);
  });
  into.append(element);
  return end;
}

function startsBlock(line) {
  return [FENCE, HEADING, BULLET, NUMBER].some((pattern) => pattern.test(line));
}

function filled(tag, text) {
  const element = make(tag);
  inline(text, element);
  return element;
}

function inline(text, into) {
  let last = 0;
  for (const match of text.matchAll(INLINE)) {
    into.append(text.slice(last, match.index), marked(match));
    last = match.index + match[0].length;
  }
  into.append(text.slice(last));
}

function marked([, , code, bold, italic, label, address]) {
  if (code !== undefined) return make("code", "", code);
  if (bold !== undefined) return filled("strong", bold);
  if (italic !== undefined) return filled("em", italic);
  const link = make("a", "", label);
  link.href = address;
  link.title = address;
  link.target = "_blank";
  link.rel = "noopener noreferrer";
  return link;
}
