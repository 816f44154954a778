// The turns of a conversation as they are seen: questions, answers with their thoughts, calls and costs, and the forms
// to change them. Knows neither server nor store; what a reader does goes to `acts`:
// edit(index, text), again(index), results(index, texts), leave().

import { isAnswered } from "./conversation.js";
import { copy, iconButton, make, refresh, textButton } from "./elements.js";
import { render } from "./markdown.js";
import { bytes, figures, seconds, work } from "./units.js";

const ENDINGS = {
  "": "Interrupted.",
  error: "Interrupted.",
  length: "The answer reached its limit of tokens.",
  stopped: "Stopped.",
};

export class Turns {
  constructor(element, acts) {
    this.element = element;
    this.acts = acts;
    this.shown = []; // {message, mark, element, answer}
    element.addEventListener("click", ({ target }) => {
      const button = target.closest("button.copy");
      if (button) copy(button.closest(".code").querySelector("pre").textContent, button);
    });
  }

  // growing: whether the last answer is under way. What is the same stays as it is.
  show(messages, growing) {
    this.messages = messages;
    const wanted = messages
      .map((message, index) => ({ message, mark: `${index} ${this.numResults(index)} ${messages.length - index === 1}` }))
      .filter(({ message: { role } }) => role === "user" || role === "assistant");
    const first = wanted.findIndex(({ message, mark }, at) => {
      return message !== this.shown[at]?.message || (mark !== this.shown[at].mark && message.role === "assistant");
    });
    const same = first < 0 ? wanted.length : first;
    for (const { element } of this.shown.splice(same)) element.remove();
    for (const { message, mark } of wanted.slice(same)) this.add(message, mark);
    this.shown.at(-1)?.answer?.show(growing);
  }

  // The last answer has grown.
  grow() {
    this.shown.at(-1)?.answer?.show(true);
  }

  add(message, mark) {
    const index = this.messages.indexOf(message);
    const isAnswer = message.role === "assistant";
    const acts = { again: () => this.acts.again(index), calls: () => this.calls(index, message.tool_calls) };
    const answer = isAnswer ? new Answer(message, acts) : null;
    const element = answer?.element ?? this.question(index, message.content);
    if (answer && index < this.messages.length - 1) answer.show(false);
    this.shown.push({ message, mark, element, answer });
    this.element.append(element);
  }

  numResults(index) {
    const results = this.messages.slice(index + 1);
    const other = results.findIndex(({ role }) => role !== "tool");
    return other < 0 ? results.length : other;
  }

  question(index, text) {
    const element = turn("user");
    element.append(make("div", "asked", text));
    const tools = make("div", "tools");
    const copier = iconButton("copy", "Copy the question", () => copy(text, copier));
    tools.append(
      copier,
      iconButton("edit", "Edit the question", () => this.edit(index)),
    );
    element.append(tools);
    element.dataset.index = index;
    return element;
  }

  // Turns a question into a form; without an index the last one.
  edit(index = this.messages.findLastIndex(({ role }) => role === "user")) {
    const element = this.element.querySelector(`.turn.user[data-index="${index}"]`);
    if (!element || element.querySelector("form")) return;
    const shown = [...element.children];
    const form = make("form", "editor");
    const area = make("textarea");
    area.value = this.messages[index].content;
    area.setAttribute("aria-label", "Your question");
    const cancel = () => {
      element.classList.remove("editing");
      element.replaceChildren(...shown);
      this.acts.leave();
    };
    const send = () => area.value.trim() && this.acts.edit(index, area.value.trim());
    const buttons = make("div", "buttons");
    buttons.append(textButton("Cancel", "quiet", cancel), textButton("Ask this", "filled", send));
    form.append(area, buttons);
    form.addEventListener("submit", (event) => event.preventDefault());
    area.addEventListener("input", () => fit(area));
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") cancel();
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send();
      else if (event.key !== "Escape") return;
      event.preventDefault();
      event.stopPropagation();
    });
    element.classList.add("editing");
    element.replaceChildren(form);
    fit(area);
    area.focus();
  }

  // The calls of an answer, with their results or a form for them.
  calls(index, calls) {
    const results = new Map();
    for (let at = index + 1; this.messages[at]?.role === "tool"; at += 1) {
      results.set(this.messages[at].tool_call_id, this.messages[at].content);
    }
    const form = make("form", "calls");
    form.append(...calls.map((call) => showCall(call, results.get(call.id))));
    const whole = ["tool_calls", "stop"].includes(this.messages[index].about?.ending);
    if (isAnswered(this.messages, index) || !whole || index < this.messages.length - 1) return form;
    const areas = calls.map(() => resultArea());
    for (const [at, area] of areas.entries()) form.children[at].append(area);
    const send = textButton(calls.length > 1 ? "Send the results" : "Send the result", "filled", () => {
      this.acts.results(index, areas.map(({ value }) => value));
    });
    const check = () => (send.disabled = areas.some(({ value }) => !value.trim()));
    form.addEventListener("input", check);
    form.addEventListener("submit", (event) => event.preventDefault());
    form.append(send);
    check();
    return form;
  }
}

// One answer: above it its thought, folded once the answer itself begins, below it calls, notes and its cost.
class Answer {
  // acts: again() asks for another, calls() makes the form of its calls.
  constructor(message, acts) {
    this.message = message;
    this.acts = acts;
    this.finished = false;
    this.element = turn("assistant");
    this.parts = {}; // elements by name, made when first needed
  }

  show(growing) {
    if (this.finished) return;
    const { content, reasoning_content, tool_calls } = this.message;
    const began = Boolean(content || reasoning_content || tool_calls);
    this.element.classList.toggle("waiting", growing && !began);
    this.element.classList.toggle("growing", growing && began);
    if (reasoning_content) this.showThought(reasoning_content, growing && !content && !tool_calls);
    if (content) refresh(this.part("said", () => make("div", "said")), render(content));
    if (tool_calls && growing) this.part("calls", () => make("div", "calls")).replaceChildren(...tool_calls.map(showCall));
    if (!growing) this.finish(began);
  }

  showThought(text, thinking) {
    const thought = this.part("thought", makeThought);
    const told = this.message.about?.thought_seconds;
    const took = told === undefined ? "Thought" : `Thought for ${seconds(told)}`;
    thought.firstChild.textContent = thinking ? "Thinking" : took;
    if (thought.lastChild.textContent !== text) thought.lastChild.textContent = text;
    if (thinking) thought.open = true;
    else if (!this.folded) thought.open = false;
    this.folded = !thinking; // once, so that a reader may open the thought again
  }

  part(name, build) {
    this.parts[name] ??= build();
    if (!this.parts[name].parentElement) this.element.append(this.parts[name]);
    return this.parts[name];
  }

  finish(began) {
    const { content, tool_calls, about = {} } = this.message;
    this.finished = true;
    this.parts.calls?.remove();
    if (tool_calls) this.element.append(this.acts.calls());
    const ending = ENDINGS[about.ending];
    if (ending) this.element.append(note(ending));
    else if (!content.trim() && !tool_calls) {
      this.element.append(note("The model gave an empty answer."));
      if (this.parts.thought) this.parts.thought.open = true;
    }
    if (about.cost) this.element.append(costLine(about.cost));
    this.element.append(this.tools(began));
  }

  tools(began) {
    const tools = make("div", "tools");
    const copier = iconButton("copy", "Copy the answer", () => copy(this.message.content, copier));
    if (began) tools.append(copier);
    tools.append(iconButton("again", "Answer again", this.acts.again));
    return tools;
  }
}

function turn(role) {
  const element = make("div", `turn ${role}`);
  element.setAttribute("aria-label", role === "user" ? "You" : "Model");
  element.setAttribute("role", "article");
  return element;
}

function makeThought() {
  const element = make("details", "thought");
  element.append(make("summary"), make("div", "thought-text"));
  return element;
}

function showCall({ function: { name, arguments: text } }, result) {
  const element = make("div", "call");
  const code = make("pre", "", pretty(text));
  code.tabIndex = 0; // so that the keyboard can scroll it
  element.append(make("div", "call-name", name), code);
  if (typeof result === "string") {
    const shown = make("pre", "result", result);
    shown.tabIndex = 0;
    element.append(make("div", "call-name", "Result"), shown);
  }
  return element;
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

function resultArea() {
  const area = make("textarea");
  area.placeholder = "What the tool gives back";
  area.setAttribute("aria-label", "Result of the call");
  area.rows = 2;
  return area;
}

function note(text) {
  return make("p", "note", text);
}

// What the answer cost, in one quiet line; what the figures rest on is said where the pointer rests.
function costLine(cost) {
  const parts = [work(cost.flops), `${bytes(cost.kv_byte_seconds)}·s of cache`];
  if (cost.joules !== null) parts.unshift(`${figures(cost.joules)} J`);
  if (cost.dollars !== null) parts.unshift(`$${figures(cost.dollars)}`);
  const element = make("p", "note cost", parts.join(" · "));
  const sources = [cost.energy_source && `energy: ${cost.energy_source}`, cost.price && `price: ${cost.price}`];
  element.title = sources.filter(Boolean).join("; ");
  return element;
}

export function fit(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight}px`;
}
