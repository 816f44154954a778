// Small pieces of which the page is made: elements, icons, buttons, the clipboard. Knows nothing of conversations.

const SVG = "http://www.w3.org/2000/svg";
const COPIED_MS = 1500;
const ICONS = {
  // lines in a box of 20 x 20
  again: "M15.6 8.2A6 6 0 1 0 16 11M16 4.5v4h-4",
  copy: "M7.5 7.5h8v8h-8zM4.5 12.5v-8h8",
  done: "M4.5 10.5l3.7 3.7 7.300-8",
  edit: "M4.5 15.5l.6-3 8-8 2.4 2.4-8 8z",
  save: "M10 4v8.5M6.5 9.300 10 12.800l3.5-3.5M4.5 16h11",
  trash: "M5 6.5h10M8 6.5V4.5h4v2M6.200 6.5l.6 9h6.4l.6-9",
};

export const byId = (id) => document.getElementById(id);

export function make(tag, className = "", text = "") {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text) element.textContent = text;
  return element;
}

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  const path = document.createElementNS(SVG, "path");
  svg.setAttribute("viewBox", "0 0 20 20");
  svg.setAttribute("aria-hidden", "true");
  svg.setAttribute("class", "icon");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

// A button that shows an icon, and says in words what it does.
export function iconButton(name, label, act) {
  const button = make("button", "bare");
  button.type = "button";
  button.title = label;
  button.setAttribute("aria-label", label);
  button.append(icon(name));
  if (act) button.addEventListener("click", act);
  return button;
}

export function textButton(label, className, act) {
  const button = make("button", className, label);
  button.type = "button";
  button.addEventListener("click", act);
  return button;
}

// Copies, and shows on the button that it did.
export async function copy(text, button) {
  await toClipboard(text);
  button.replaceChildren(icon("done"));
  setTimeout(() => button.replaceChildren(icon("copy")), COPIED_MS);
}

async function toClipboard(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  // Browsers have no clipboard for pages that come by plain HTTP from another machine, but for this older way.
  const area = make("textarea", "unseen");
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

// Makes `element` hold what `fragment` holds, and leaves alone what is the same already: selections stay.
export function refresh(element, fragment) {
  const fresh = [...fragment.childNodes];
  for (const [index, node] of fresh.entries()) {
    const old = element.childNodes[index];
    if (!old) element.append(node);
    else if (!old.isEqualNode(node)) old.replaceWith(node);
  }
  while (element.childNodes.length > fresh.length) element.lastChild.remove();
}

export function download(name, text) {
  const link = make("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 0);
}
