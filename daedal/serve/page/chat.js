// The chat page: keeps the conversation, sends it, shows the answer as it comes, and the live line below.

import { render } from "./markdown.js";

// Small models wander at higher temperatures: what the default model's publisher advises.
const SAMPLING = { temperature: 0.2, top_p: 0.9 };
const IDLE_POLL_MS = 5000;
const BUSY_POLL_MS = 1000;
const SOON_MS = 300; // for the server to notice that a stopped answer is not wanted any more
const NEAR_BOTTOM_PX = 80;

const byId = (id) => document.getElementById(id);
const scroller = byId("scroller");
const conversation = byId("conversation");
const input = byId("input");

let messages = []; // {role, content, reasoning_content}, as the API takes them
let running = null; // the AbortController of the answer under way
let canChat = true;
let countsCost = false; // whether the server can say what an answer cost

async function send(text) {
  const question = { role: "user", content: text };
  const asked = [...messages, question];
  const controller = new AbortController();
  setRunning(controller);
  showError("");
  byId("welcome").hidden = true;
  const turn = addTurn("user");
  turn.textContent = text;
  const answer = new Answer(addTurn("assistant"));
  scrollToEnd();
  let problem = "";
  try {
    await receive(asked, controller.signal, answer);
  } catch (error) {
    if (!controller.signal.aborted) problem = error.message || "The connection to the server was lost: try again.";
  }
  if (running !== controller) return; // a new chat was begun meanwhile
  answer.finish(controller.signal.aborted);
  if (answer.began || controller.signal.aborted) {
    messages = [...asked, answer.message()];
  } else if (problem) {
    turn.remove();
    answer.element.remove();
    input.value = text;
    byId("welcome").hidden = messages.length > 0;
  } else {
    messages = [...asked, answer.message()];
  }
  showError(problem);
  setRunning(null);
}

async function receive(asked, signal, answer) {
  const body = {
    messages: asked,
    tool_choice: "auto", // a call is shown as one, although the page offers no tools
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
    ...(countsCost ? { include_cost: true } : {}),
    ...SAMPLING,
  };
  const response = await fetch("/v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  if (!response.ok) throw new Error(await refusal(response));
  for await (const chunk of events(response.body)) {
    if (chunk.error) throw new Error(sentence(chunk.error.message));
    answer.take(chunk);
  }
}

async function refusal(response) {
  try {
    return sentence((await response.json()).error.message);
  } catch {
    return `The server answered with status ${response.status}.`;
  }
}

function sentence(message) {
  const text = message.charAt(0).toUpperCase() + message.slice(1);
  return /[.!?]$/.test(text) ? text : `${text}.`;
}

// Server-sent events, each one JSON object, until `[DONE]`.
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The server ended the answer early: try again.");
    const parts = (rest + value).split(/\r?\n\r?\n/);
    rest = parts.pop();
    for (const part of parts) {
      const data = part
        .split(/\r?\n/)
        .filter((line) => line.startsWith("data:"))
        .map((line) => line.slice(5).trim())
        .join("\n");
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}

// One answer: above it its thought, folded once the answer itself begins, and below it the tools that it calls.
class Answer {
  constructor(element) {
    this.element = element;
    this.text = "";
    this.thought = "";
    this.calls = []; // {name, arguments}
    this.parts = {}; // elements by name, made when first needed
    this.firstAt = 0;
    this.firstCount = 0;
    this.framed = false;
    element.classList.add("waiting");
  }

  take(chunk) {
    const count = chunk.usage?.completion_tokens ?? 0;
    if (count) this.measure(count);
    this.cost = chunk.usage?.cost_details ?? this.cost;
    const delta = chunk.choices[0]?.delta;
    if (!delta?.content && !delta?.reasoning_content && !delta?.tool_calls) return;
    this.thought += delta.reasoning_content ?? "";
    this.text += delta.content ?? "";
    for (const { index, function: piece } of delta.tool_calls ?? []) {
      this.calls[index] ??= { name: piece.name, arguments: "" };
      this.calls[index].arguments += piece.arguments;
    }
    if (this.framed) return;
    this.framed = true;
    requestAnimationFrame(() => this.draw());
  }

  get began() {
    return Boolean(this.text || this.thought || this.calls.length);
  }

  // Calls are only shown: there is nobody here to answer them, so they are no part of the conversation.
  message() {
    const thought = this.thought ? { reasoning_content: this.thought } : {};
    return { role: "assistant", content: this.text, ...thought };
  }

  // Tokens per second since the first one: the prompt's time is not the answer's speed.
  measure(count) {
    const now = performance.now();
    if (!this.firstAt) {
      this.firstAt = now;
      this.firstCount = count;
    } else if (count > this.firstCount) {
      const perSecond = ((count - this.firstCount) * 1000) / (now - this.firstAt);
      byId("live-speed").textContent = `${perSecond.toFixed(perSecond < 100 ? 1 : 0)} tokens/s`;
    }
  }

  draw() {
    this.framed = false;
    if (!running) return;
    const follow = atEnd();
    this.element.classList.remove("waiting");
    this.element.classList.add("growing");
    this.show();
    if (follow) scrollToEnd();
  }

  show() {
    if (this.thought) this.part("thought", makeThought).lastChild.textContent = this.thought;
    if (this.text || this.calls.length) this.fold();
    if (this.text) this.part("said", () => make("div", "said")).replaceChildren(render(this.text));
    if (this.calls.length) this.part("calls", () => make("div", "calls")).replaceChildren(...this.calls.map(showCall));
  }

  // Once, so that a reader may open the thought again.
  fold() {
    if (this.parts.thought && !this.folded) this.parts.thought.open = false;
    this.folded = true;
  }

  part(name, build) {
    if (!this.parts[name]) {
      this.parts[name] = build();
      this.element.append(this.parts[name]);
    }
    return this.parts[name];
  }

  finish(stopped) {
    const follow = atEnd();
    this.element.classList.remove("waiting", "growing");
    this.show();
    if (stopped) this.element.append(note("Stopped."));
    else if (!this.text.trim() && !this.calls.length) this.element.append(note("The model gave an empty answer."));
    if (this.cost) this.element.append(costLine(this.cost));
    if (follow) scrollToEnd();
  }
}

function makeThought() {
  const element = make("details", "thought");
  element.open = true;
  element.append(make("summary", "", "Thought"), make("div", "thought-text"));
  return element;
}

function showCall({ name, arguments: text }) {
  const element = make("pre", "call");
  element.tabIndex = 0; // so that the keyboard can scroll it
  element.append(make("code", "", `${name}(${text})`));
  return element;
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

// What a token costs with a converted model and with the one that it was made of, and how well they do.
function showCompared(models) {
  const table = byId("compared");
  if (!models?.length || !table.hidden) return;
  const context = new Intl.NumberFormat("en").format(models[0].context);
  const measures = [
    ["", (model) => model.name],
    ["Cache per token", (model) => bytes(model.kv_bytes_per_token)],
    ["Parameters per token", (model) => amount(model.active_params)],
    [`Work per token after ${context}`, (model) => work(model.decode_flops_per_token)],
    ["Perplexity of real text", (model) => `× ${model.perplexity_ratio.toFixed(3)}`],
  ];
  for (const [index, [title, told]] of measures.entries()) {
    const row = table.insertRow();
    row.append(make("th", "", title), ...models.map((model) => make(index ? "td" : "th", "", told(model))));
  }
  table.hidden = false;
}

function work(flops) {
  return scaled(flops, 1000, ["FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"]);
}

// Two figures that count, and no exponent.
function figures(value) {
  return new Intl.NumberFormat("en", { maximumSignificantDigits: 2 }).format(value);
}

function make(tag, className, text = "") {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
}

function addTurn(role) {
  const element = document.createElement("div");
  element.className = `turn ${role}`;
  element.setAttribute("aria-label", role === "user" ? "You" : "Model");
  element.setAttribute("role", "article");
  conversation.append(element);
  return element;
}

function setRunning(controller) {
  running = controller;
  conversation.setAttribute("aria-busy", String(Boolean(controller)));
  byId("send").hidden = Boolean(controller);
  byId("stop").hidden = !controller;
  fit();
  pollIn(SOON_MS);
}

function showError(text) {
  byId("error").textContent = text;
  byId("error").hidden = !text;
}

function fit() {
  byId("send").disabled = !canChat || !input.value.trim();
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
}

function atEnd() {
  return scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR_BOTTOM_PX;
}

function scrollToEnd() {
  scroller.scrollTop = scroller.scrollHeight;
}

function submit() {
  const text = input.value.trim();
  if (!text || running || !canChat) return;
  input.value = "";
  send(text);
}

function newChat() {
  const controller = running;
  messages = [];
  setRunning(null);
  controller?.abort();
  conversation.replaceChildren();
  byId("welcome").hidden = false;
  showError("");
  input.focus();
}

let timer = 0;

async function poll() {
  if (!document.hidden) {
    try {
      const response = await fetch("/stats");
      if (response.ok) showStats(await response.json());
    } catch {
      byId("live-cache").textContent = "The server does not answer";
    }
  }
  pollIn(running ? BUSY_POLL_MS : IDLE_POLL_MS);
}

function pollIn(milliseconds) {
  clearTimeout(timer);
  timer = setTimeout(poll, milliseconds);
}

function showStats(stats) {
  countsCost = stats.counts_cost;
  showCompared(stats.compared);
  byId("model").textContent = stats.model;
  byId("model").title = stats.model;
  document.title = `${stats.model} – Daedal`;
  byId("live-cache").textContent = `${bytes(stats.kv_bytes_used)} of ${bytes(stats.kv_bytes_total)} KV cache`;
  if (stats.total_params && stats.active_params) {
    const share = (100 * stats.active_params) / stats.total_params;
    const shown = share.toFixed(share < 10 ? 1 : 0);
    byId("live-active").textContent = `${shown}% of ${amount(stats.total_params)} parameters active`;
    byId("live-active-item").hidden = false;
  }
  if (canChat && !stats.chat) {
    canChat = false;
    input.disabled = true;
    input.placeholder = "This model has no chat format";
    showError("This model completes text but has no chat format: use /v1/completions.");
    fit();
  }
}

function bytes(count) {
  return scaled(count, 1024, ["B", "KiB", "MiB", "GiB", "TiB"]);
}

function scaled(count, step, units) {
  let value = count;
  let unit = 0;
  while (value >= step && unit < units.length - 1) {
    value /= step;
    unit += 1;
  }
  return `${value.toFixed(unit && value < 10 ? 1 : 0)} ${units[unit]}`;
}

function amount(count) {
  const short = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });
  if (count >= 1e9) return `${short.format(count / 1e9)} B`;
  if (count >= 1e6) return `${short.format(count / 1e6)} M`;
  return short.format(count);
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
byId("stop").addEventListener("click", () => {
  running?.abort();
  input.focus();
});
byId("new-chat").addEventListener("click", newChat);
input.addEventListener("input", fit);
input.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    submit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) poll();
});
fit();
poll();
