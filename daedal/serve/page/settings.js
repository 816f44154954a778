// What a reader has chosen: how answers are drawn, what the model is told first, its tools, the page's colours. Kept in
// the browser, the server's key too, which goes nowhere else. Knows the dialog, not the conversation.

import { byId } from "./elements.js";

const KEPT_AS = "daedal.settings";
const KEY_KEPT_AS = "daedal.key";
// Small models wander at higher temperatures: what the default model's publisher advises.
const SAMPLING = { temperature: 0.2, top_p: 0.9 };
const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];
const TEXTS = ["system", "thinking", "effort", "tools", "theme"];

export class Settings {
  constructor(changed) {
    this.changed = changed;
    this.values = kept();
    this.abilities = { thinks: [], efforts: [], tools: false };
    this.dialog = byId("settings");
    this.form = byId("settings-form");
    for (const name of NUMBERS) this.form.elements[name].placeholder = SAMPLING[name] ?? "the model's own";
    byId("open-settings").addEventListener("click", () => this.open());
    byId("forget-key").addEventListener("click", () => this.useKey(""));
    this.dialog.addEventListener("click", ({ target }) => {
      if (target === this.dialog) this.close(); // outside of what is in it
    });
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.close();
    });
    this.form.addEventListener("input", () => this.read());
    this.form.elements.seed.placeholder = "another each time";
  }

  get key() {
    return read(KEY_KEPT_AS) ?? "";
  }

  get system() {
    return this.values.system?.trim() ?? "";
  }

  useKey(key) {
    write(KEY_KEPT_AS, key);
    byId("key-settings").hidden = !key;
    this.changed();
  }

  // What the model that is served can do: {thinks, efforts, tools}.
  know(abilities) {
    this.abilities = abilities;
    byId("thinking-setting").hidden = abilities.thinks.length < 2;
    byId("effort-setting").hidden = !abilities.efforts.length;
    byId("tools-setting").hidden = !abilities.tools;
    const { effort } = this.form.elements;
    const told = ["", ...abilities.efforts];
    if (effort.options.length === told.length) return;
    effort.replaceChildren(...told.map((level) => new Option(level || "the model's own", level)));
    effort.value = this.values.effort ?? "";
  }

  // Fields of a request.
  request() {
    const { thinks, efforts, tools } = this.abilities;
    const { thinking, effort, tools: text, ...values } = this.values;
    const fields = { ...SAMPLING, tool_choice: "auto" }; // a call is shown as one, also where no tools are offered
    for (const name of NUMBERS) if (values[name] !== undefined) fields[name] = values[name];
    if (thinking && thinks.length > 1) fields.thinking = { type: thinking };
    if (effort && efforts.includes(effort) && thinking !== "disabled") fields.reasoning_effort = effort;
    if (text && tools) fields.tools = JSON.parse(text);
    return fields;
  }

  open() {
    for (const name of [...NUMBERS, ...TEXTS]) this.form.elements[name].value = this.values[name] ?? "";
    byId("key-settings").hidden = !this.key;
    this.check();
    this.dialog.showModal();
  }

  close() {
    if (this.form.reportValidity()) this.dialog.close();
  }

  // Takes over what is valid; the rest stays as it was until it is.
  read() {
    this.check();
    const values = { ...this.values };
    for (const name of [...NUMBERS, ...TEXTS]) {
      const field = this.form.elements[name];
      if (!field.validity.valid) continue;
      if (field.value.trim() === "") delete values[name];
      else values[name] = NUMBERS.includes(name) ? field.valueAsNumber : field.value;
    }
    this.values = values;
    write(KEPT_AS, JSON.stringify(values));
    if (values.theme) document.documentElement.dataset.theme = values.theme;
    else delete document.documentElement.dataset.theme;
    this.changed();
  }

  check() {
    const { tools } = this.form.elements;
    tools.setCustomValidity(!tools.value.trim() || isList(tools.value) ? "" : "Give a JSON list of tools.");
  }
}

function isList(text) {
  try {
    return Array.isArray(JSON.parse(text));
  } catch {
    return false;
  }
}

// Only what has the type it should have: another version of the page, or a hand, may have written it.
function kept() {
  let found;
  try {
    found = JSON.parse(read(KEPT_AS) ?? "{}");
  } catch {
    found = {};
  }
  const values = {};
  for (const name of NUMBERS) if (Number.isFinite(found?.[name])) values[name] = found[name];
  for (const name of TEXTS) if (typeof found?.[name] === "string") values[name] = found[name];
  if (values.tools && !isList(values.tools)) delete values.tools;
  return values;
}

// A browser may keep nothing at all: then settings last as long as the page.
const fleeting = new Map();

function read(name) {
  try {
    return localStorage.getItem(name);
  } catch {
    return fleeting.get(name) ?? null;
  }
}

function write(name, text) {
  try {
    if (text) localStorage.setItem(name, text);
    else localStorage.removeItem(name);
  } catch {
    fleeting.set(name, text);
  }
}
