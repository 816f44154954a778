// The list of conversations beside the one that is open: to open, rename, export and delete. Knows heads alone; what a
// reader does goes to `acts`: open(id), rename(id, title), keep(id), remove(id).

import { iconButton, make } from "./elements.js";

export class List {
  constructor(element, acts) {
    this.element = element;
    this.acts = acts;
  }

  // heads: {id, title}. running: ids of those with an answer under way.
  show(heads, current, running) {
    if (this.element.querySelector("input")) return; // somebody is typing a name
    this.element.replaceChildren(...heads.map((head) => this.row(head, head.id === current, running.has(head.id))));
  }

  row({ id, title }, isCurrent, isRunning) {
    const row = make("li", isCurrent ? "current" : "");
    const opener = make("button", "opener", title || "Untitled");
    opener.type = "button";
    opener.title = title;
    if (isCurrent) opener.setAttribute("aria-current", "true");
    if (isRunning) opener.append(make("span", "running"), make("span", "unseen", "answering"));
    opener.addEventListener("click", () => this.acts.open(id));
    const tools = make("div", "row-tools");
    tools.append(
      iconButton("edit", "Rename", () => this.rename(row, id, title)),
      iconButton("save", "Export as JSON", () => this.acts.keep(id)),
      iconButton("trash", "Delete", () => this.acts.remove(id)),
    );
    row.append(opener, tools);
    return row;
  }

  rename(row, id, title) {
    const shown = [...row.children];
    const input = make("input");
    input.value = title;
    input.maxLength = 200;
    input.setAttribute("aria-label", "Name of the conversation");
    let left = false; // leaving takes the focus away, which would leave again
    const leave = (named) => {
      if (left) return;
      left = true;
      row.replaceChildren(...shown);
      if (named && named !== title) this.acts.rename(id, named);
    };
    input.addEventListener("keydown", (event) => {
      if (event.key === "Enter") leave(input.value.trim());
      else if (event.key === "Escape") leave("");
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    input.addEventListener("blur", () => leave(input.value.trim()));
    row.replaceChildren(input);
    input.select();
  }
}
