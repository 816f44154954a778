// A small, safe part of Markdown: headings, lists, code, bold, italics. Text only ever becomes text nodes, so nothing
// that a model writes can become markup.

const FENCE = /^\s*(```+|~~~+)\s*\S*\s*$/;
const HEADING = /^#{1,6}\s+(.*)$/;
const BULLET = /^\s*[-*+]\s+(.*)$/;
const NUMBER = /^\s*(\d{1,9})[.)]\s+(.*)$/;
// Code opens with one to three backticks and no more: a long run of them would take the search cubic time.
const INLINE = /(?<!`)(`{1,3})(?!`)(.+?)(?<!`)\1(?!`)|\*\*(?=\S)(.+?)\*\*|\*(?=[^\s*])([^*\n]+?)\*(?!\w)/gs;

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
  return paragraph(lines, at, into);
}

function code(lines, at, into) {
  const fence = FENCE.exec(lines[at])[1];
  let end = at + 1;
  while (end < lines.length && !lines[end].trim().startsWith(fence)) end += 1;
  const pre = document.createElement("pre");
  const inner = document.createElement("code");
  inner.textContent = lines.slice(at + 1, end).join("\n");
  pre.tabIndex = 0; // so that the keyboard can scroll it
  pre.append(inner);
  into.append(pre);
  return end + 1;
}

function list(lines, at, into, tag, pattern) {
  const element = document.createElement(tag);
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
  while (end < lines.length && lines[end].trim() && !startsBlock(lines[end])) end += 1;
  const element = document.createElement("p");
  lines.slice(at, end).forEach((line, index) => {
    if (index) element.append(document.createElement("br"));
    inline(line, element);
  });
  into.append(element);
  return end;
}

function startsBlock(line) {
  return [FENCE, HEADING, BULLET, NUMBER].some((pattern) => pattern.test(line));
}

function filled(tag, text) {
  const element = document.createElement(tag);
  inline(text, element);
  return element;
}

function inline(text, into) {
  let last = 0;
  for (const match of text.matchAll(INLINE)) {
    into.append(text.slice(last, match.index));
    const [, , codeText, bold, italic] = match;
    const element = document.createElement(codeText !== undefined ? "code" : bold !== undefined ? "strong" : "em");
    if (codeText !== undefined) element.textContent = codeText;
    else inline(bold ?? italic, element);
    into.append(element);
    last = match.index + match[0].length;
  }
  into.append(text.slice(last));
}
